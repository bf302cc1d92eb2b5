"""With `recompute_gate`, gates are computed again in the backward pass. Nothing but memory may tell."""
import copy
import io
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import SIZES, randomize
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

from gmnet_timm import gmnet
from gmnet_timm.gmnet import GmNetBlock

GATES = ['identity', 'fc', 'dw', 'ln']


def kept_bytes(model, x) -> int:
    """Bytes that autograd keeps between forward and backward, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # itself it would keep the graph that keeps it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).sum()  # noqa: F841, alive until all is counted
    return sum(size for address, size in kept.items() if address not in own)


def plain(model):
    """The model with everything kept."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, GmNetBlock):
            block.recompute_gate = False
    return model


def step(model, x, autocast=None):
    """Loss, gradients (also that of the input) and buffers after one forward and backward pass."""
    torch.manual_seed(1)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        loss = F.cross_entropy(model(x), torch.arange(len(x)))
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_identical(model, x, **kwargs):
    reference = plain(model)
    for actual, expected in zip(step(model, x, **kwargs), step(reference, x, **kwargs), strict=True):
        assert torch.equal(actual, expected)


def train_model(**kwargs):
    return randomize(timm.create_model('gmnet_s1', depths=(1, 1, 1, 1), recompute_gate=True, **kwargs)).train()


@pytest.fixture
def checkpointed(monkeypatch):
    """A list that grows with each gate that will be computed again."""
    calls = []

    def spy(*args, **kwargs):
        calls.append(args)
        return checkpoint(*args, **kwargs)

    checkpoint = gmnet.checkpoint
    monkeypatch.setattr(gmnet, 'checkpoint', spy)
    return calls


@pytest.mark.parametrize('gate', GATES)
def test_a_block_keeps_two_wide_tensors_less(gate):
    block = GmNetBlock(8, mlp_ratio=4, gate=gate, recompute_gate=True).train()
    x = torch.randn(2, 8, 16, 16)
    wide = 4 * 2 * 32 * 16 * 16
    assert kept_bytes(plain(block), x) - kept_bytes(block, x) == 2 * wide


@pytest.mark.parametrize('recompute_gate', [False, True])
@pytest.mark.parametrize('name', SIZES)
def test_memory_of_the_networks(name, recompute_gate):
    """Counted by hand: what convolutions, norms, activations and layer scales read."""
    model = timm.create_model(name, recompute_gate=recompute_gate).train()
    elements = 3 * 224 ** 2 + 3 * 32 * 112 ** 2  # the image; norm, activation and first down-sampling behind the stem
    for i, stage in enumerate(model.stages):
        blocks = list(stage)[1:]
        dim, hidden = blocks[0].f1.conv.in_channels, blocks[0].f1.conv.out_channels
        # Norm of the down-sampling, output of the stage; per block: input, two norms, what follows them, layer scale,
        # and of the gate input, activation and product.
        elements += (56 // 2 ** i) ** 2 * (2 * dim + len(blocks) * (6 * dim + (1 if recompute_gate else 3) * hidden))
    batch = 2
    kept = kept_bytes(model, torch.randn(batch, 3, 224, 224))
    assert kept == pytest.approx(4 * batch * elements, rel=1e-3)  # the rest: pooled features, statistics of the norms
    assert (name, recompute_gate) != ('gmnet_s3', True) or kept / batch / 2 ** 20 < 47


@pytest.mark.slow
def test_published_numbers():
    """The table of docs/training.md, and what it says of 16, 24 and 80 GB."""
    document = ' '.join((Path(__file__).parent.parent / 'docs' / 'training.md').read_text().split())
    for name in SIZES:
        models = [timm.create_model(name, recompute_gate=again).train() for again in (False, True)]
        full, less = (kept_bytes(model, torch.randn(2, 3, 224, 224)) / 2 for model in models)
        mib = [kept / 2 ** 20 for kept in (full, less)]
        gib = [kept / 4 for kept in mib]  # of 256 images
        assert f'| {name} | {mib[0]:.1f} | {mib[1]:.1f} | {gib[0]:.1f} | {gib[1]:.1f} |' in document
        if name == 'gmnet_s3':
            state = 16 * sum(p.numel() for p in models[0].parameters())
            room = [[int((gb * 1e9 - state) / kept) for gb in (16, 24, 80)] for kept in (full, less)]
            assert 'room for {}, {} and {} images in 16, 24 and 80 GB'.format(*room[0]) in document
            assert 'with recompute_gate=True for {}, {} and {}.'.format(*room[1]) in document


@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('gate', GATES)
@pytest.mark.slow
def test_nothing_but_memory_changes(gate, memory_format, autocast, checkpointed):
    model = train_model(gate=gate, drop_path_rate=0.5).to(memory_format=memory_format)
    assert_identical(model, torch.randn(3, 3, 64, 64).to(memory_format=memory_format), autocast=autocast)
    assert len(checkpointed) == 4  # the plain copy has none
    assert all(int(m.num_batches_tracked) == 1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize('act_layer', ['relu', 'gelu', 'silu', 'hard_swish', 'softplus', nn.RReLU, nn.Mish])
def test_any_activation(act_layer, checkpointed):
    act_layer = nn.Softplus if act_layer == 'softplus' else act_layer
    assert_identical(train_model(act_layer=act_layer), torch.randn(2, 3, 32, 32))
    assert len(checkpointed) == 4


@pytest.mark.parametrize('norm_layer', ['groupnorm1', 'layernorm2d'])
def test_other_norms(norm_layer):
    assert_identical(train_model(norm_layer=norm_layer), torch.randn(2, 3, 32, 32))


def test_grad_checkpointing(checkpointed):
    model = train_model()
    reference = plain(model)
    model.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32)
    # the buffers differ, as those of every model of timm: full checkpointing updates BatchNorm twice
    for actual, expected in zip(step(model, x)[:2], step(reference, x)[:2]):
        assert torch.equal(actual, expected)
    for p, q in zip(model.parameters(), reference.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_double_backward():
    """A gradient penalty."""
    grads = []
    model = train_model(act_layer='gelu').double()
    for net in (model, plain(model)):
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (grad,) = torch.autograd.grad(net(x).logsumexp(1).sum(), x, create_graph=True)
        grad.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
    for actual, expected in zip(*grads):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_backward_twice():
    model = train_model()
    loss = model(torch.randn(2, 3, 32, 32)).sum()
    loss.backward(retain_graph=True)
    first = model.stem[0].conv.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.stem[0].conv.weight.grad, 2 * first)


class Random(nn.Module):
    """An activation with a random state of its own in each forward pass."""

    def forward(self, x):
        return F.dropout(F.relu6(x), 0.3, self.training)


def test_random_activation():
    assert_identical(train_model(act_layer=Random), torch.randn(2, 3, 32, 32))


def test_functional_call_with_other_parameters():
    """The second computation uses the parameters of the call, not those of the module."""
    model = train_model()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 32, 32)
    params = {name: p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
              for name, p in model.named_parameters()}
    grads = []
    for net in (model, plain(model)):
        mine = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss = torch.func.functional_call(net, mine, (x,)).square().sum()
        grads.append(torch.autograd.grad(loss, list(mine.values())))
    for actual, expected in zip(*grads, strict=True):
        assert torch.equal(actual, expected)


def test_a_model_that_leaves_training_mode_raises():
    """Its activation may be another one then, as RReLU's is."""
    model = train_model(act_layer=nn.RReLU)
    loss = model(torch.randn(2, 3, 32, 32)).sum()
    model.eval()
    with pytest.raises(RuntimeError, match='left training mode before its backward pass'):
        loss.backward()


class Wrapped(nn.Module):
    """A convolution of another type with the same attributes, as adapters have it."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.weight, self.bias = conv, conv.weight, conv.bias

    def forward(self, x):
        return 2 * self.conv(x)


@pytest.mark.parametrize('change', [
    nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm,
    lambda conv: prune.l1_unstructured(conv, 'weight', 0.5), Wrapped])
@pytest.mark.filterwarnings('ignore:.*weight_norm.*deprecated')
def test_changed_convolutions(change):
    """A copy by `deepcopy` shares what these make, so both are built alike."""
    steps = []
    for again in (True, False):
        torch.manual_seed(0)
        model = randomize(timm.create_model('gmnet_s1', depths=(1, 1, 1, 1), recompute_gate=again)).train()
        conv = change(model.stages[2][1].g.conv)
        if change is Wrapped:
            model.stages[2][1].g.conv = conv
        steps.append(step(model, torch.ones(2, 3, 32, 32)))
    for actual, expected in zip(*steps, strict=True):
        assert torch.equal(actual, expected)


def test_what_cannot_work_raises():
    with pytest.raises(ValueError, match='for activations without parameters'):
        train_model(act_layer='prelu')
    x = torch.randn(2, 3, 32, 32)
    model = train_model()
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda params: torch.func.functional_call(model, params, (x,)).sum())(
            dict(model.named_parameters()))


def test_forward_mode():
    block = GmNetBlock(4, norm_layer='groupnorm1', init_values=None, recompute_gate=True).double().train()
    x, v = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    with forward_ad.dual_level():
        try:
            tangent = forward_ad.unpack_dual(block(forward_ad.make_dual(x, v))).tangent
        except NotImplementedError:
            pytest.skip('this torch has no forward mode for checkpointed functions')
    x.requires_grad_()
    u = torch.randn_like(x)
    (grad,) = torch.autograd.grad((block(x) * u).sum(), x)
    torch.testing.assert_close((grad * v).sum(), (tangent * u).sum())


@pytest.mark.filterwarnings('ignore:.*torch.jit.*deprecated')
@pytest.mark.parametrize('how', ['eval', 'script', 'export', 'compile', 'unasked'])
@pytest.mark.slow
def test_no_trace_elsewhere(how, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError('computed twice')

    monkeypatch.setattr(gmnet, 'checkpoint', forbidden)
    x = torch.randn(2, 3, 32, 32)
    model = train_model()
    with pytest.raises(AssertionError, match='computed twice'):
        model(x)
    if how == 'unasked':
        timm.create_model('gmnet_s1').train()(x).sum().backward()
    elif how == 'eval':
        model.eval()(x).sum().backward()
    elif how == 'script':
        torch.jit.script(model)(x).sum().backward()
    elif how == 'export':
        torch.export.export(model, (x,), strict=False).module()(x).sum().backward()
    elif how == 'compile':
        torch.compile(model, backend='aot_eager', fullgraph=True)(x).sum().backward()


def test_distributed(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = train_model()
        reference = plain(model)
        ddp = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(2, 3, 32, 32)
        loss = F.cross_entropy(ddp(x), torch.arange(2))
        loss.backward()
        expected = step(reference, x)
        assert torch.equal(loss, expected[0])
        for p, q in zip(model.parameters(), reference.parameters()):
            torch.testing.assert_close(p.grad, q.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_pickle_after_training():
    model = train_model()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    torch.save(model, io.BytesIO())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_float16():
    model = train_model().cuda()
    x = torch.randn(2, 3, 64, 64, device='cuda')
    grads = []
    for net in (model, plain(model)):
        with torch.autocast('cuda', torch.float16):
            loss = net(x).sum()
        loss.backward()
        grads.append([p.grad for p in net.parameters()])
    for actual, expected in zip(*grads):
        torch.testing.assert_close(actual, expected)
