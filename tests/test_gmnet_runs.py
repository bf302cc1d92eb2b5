"""The ways in which PyTorch runs a GmNet, and its reparameterization."""
import copy
import pickle

import pytest
import timm
import torch
from model_helpers import SIZES, create, relative_error
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torch.nn.utils import parametrizations, prune

from gmnet_timm.gmnet import GmNetBlock

# --- the ways PyTorch runs a model ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings('ignore:.*torch.jit.*deprecated')
@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.slow
def test_torchscript(fuse):
    model = create()
    model = reparameterize_model(model) if fuse else model
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), expected)
        other = torch.randn(3, 3, 96, 40)
        torch.testing.assert_close(traced(other), model(other))


def test_fx():
    model = create()
    x = torch.randn(1, 3, 64, 64)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.slow
def test_compiled_training_has_no_graph_breaks():
    model = create().train()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_compile_with_inductor():
    """Fused models are compiled by the benchmarks, which compare outputs too."""
    model = create()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-5


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.slow
def test_export_with_dynamic_batch(fuse):
    model = create()
    model = reparameterize_model(model) if fuse else model
    exported = torch.export.export(
        model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    for batch in (1, 5):
        x = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_bfloat16_and_autocast():
    model = create()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            autocast = model(x)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # bfloat16 has 8 significant bits; errors of some 30 layers add up
    assert relative_error(autocast, expected) < 0.05
    assert relative_error(half, expected) < 0.05


def test_channels_last_is_kept_and_changes_nothing():
    model = create()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    stages = model.forward_intermediates(x, intermediates_only=True)
    assert all(s.is_contiguous(memory_format=torch.channels_last) for s in stages)
    assert relative_error(model(x), expected) < 1e-5


def test_deepcopy_and_pickle():
    model = create()
    x = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    fused = reparameterize_model(model)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), fused(x))


# --- reparameterization ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [SIZES[0], pytest.param(SIZES[-1], marks=pytest.mark.slow)])
def test_reparameterize(name):
    model = create(name).double()  # in float32 the order of sums alone makes 1e-6, by the processor
    x = torch.randn(2, 3, 96, 96).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        fused = reparameterize_model(model)
        assert relative_error(fused(x), expected) < 1e-13
        assert relative_error(fused.forward_features(x), model.forward_features(x)) < 1e-13
    # only the norm that ends forward_features is left, no layer scale is
    norms = [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == [fused.norm]
    assert not [key for key in fused.state_dict() if key.endswith('gamma')]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_reparameterize_in_place_is_idempotent():
    model = create()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    assert reparameterize_model(model, inplace=True) is model
    once = model(x)
    assert relative_error(once, expected) < 1e-6
    reparameterize_model(model, inplace=True)
    assert torch.equal(model(x), once)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_reparameterize_keeps_dtype(dtype):
    model = create().to(dtype)
    fused = reparameterize_model(model)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    x = torch.randn(1, 3, 64, 64, dtype=dtype)
    assert relative_error(fused(x), model(x)) < (1e-13 if dtype == torch.float64 else 0.05)


def test_reparameterize_keeps_device():
    device = torch.device('cuda' if torch.cuda.is_available() else 'meta')
    fused = reparameterize_model(create().to(device))
    assert {p.device.type for p in fused.parameters()} == {device.type}


def test_reparameterize_in_training_mode_equals_evaluation():
    """timm's scripts with `--reparam`, and timmx, fuse a model as `create_model` returns it."""
    model = create()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    fused = reparameterize_model(model.train())
    assert model.training and all(m.training for m in model.modules()), 'the original is left as it was'
    assert relative_error(fused.eval()(x), expected) < 1e-6
    assert [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)] == [fused.norm]


def test_reparameterize_leaves_other_norms_alone():
    model = create(norm_layer='groupnorm1')
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(reparameterize_model(model)(x), model(x))


def all_of(name, change):
    """A change of each block's convolution `name`."""
    def changed(model):
        for block in model.modules():
            if isinstance(block, GmNetBlock):
                change(block.get_submodule(name))
    return changed


@pytest.mark.parametrize('change', [
    all_of('dwconv2.conv', parametrizations.weight_norm),
    all_of('dwconv2.conv', parametrizations.spectral_norm),
    all_of('dwconv2.conv', lambda conv: prune.l1_unstructured(conv, 'weight', 0.5)),
    all_of('g.conv', parametrizations.weight_norm),
    all_of('g.conv', lambda conv: prune.l1_unstructured(conv, 'weight', 0.5)),
    all_of('dwconv.conv', parametrizations.spectral_norm),
    all_of('f1.conv', lambda conv: conv.register_parameter('bias', None)),
])
def test_reparameterize_leaves_changed_convolutions_alone(change):
    model = create(base_dim=8, depths=(1, 1, 1, 1), stem_chs=8, init_values=0.7)
    change(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.train()(x)
        expected = model.eval()(x)
        assert relative_error(reparameterize_model(model)(x), expected) < 1e-5


def test_reparameterize_leaves_norms_with_activations_alone():
    model = create(norm_layer=BatchNormAct2d, base_dim=8, init_values=0.7)
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(reparameterize_model(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_activation_parameters_get_device_and_dtype(device):
    model = timm.create_model('gmnet_s1', act_layer='prelu', device=device, dtype=torch.float64)
    assert {p.device.type for p in model.parameters()} == {device}
    assert {p.dtype for p in model.parameters()} == {torch.float64}
