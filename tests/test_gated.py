import argparse
import copy
import re

import pytest
import timm
import timm.utils
import torch
import torch.nn.functional as F
from model_helpers import randomize, relative_error
from timm.utils import reparameterize_model

from gmnet_timm.gmnet import GmNetBlock
from gmnet_timm.weights.architecture import infer_architecture
from gmnet_timm.weights.model import load_model

BASES = ('resnet18', 'mobilenetv2_100')
GATES = {'ewp': lambda x: x, 'gate_relu6': F.relu6, 'gate_gelu': F.gelu}


def _params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('gate', GATES)
def test_weights_of_the_original_load(base, gate):
    original, gated = timm.create_model(base), timm.create_model(f'{base}_{gate}')
    assert _params(gated) == _params(original)
    assert list(gated.state_dict()) == list(original.state_dict())
    gated.load_state_dict(original.state_dict())
    assert gated.pretrained_cfg['architecture'] == f'{base}_{gate}'


# --- both networks written out with torch.nn.functional, sharing nothing with timm's classes and ours ---------------


def _conv(weights, name, x, **kwargs):
    weight = weights[f'{name}.weight']
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, **kwargs)


def _norm(weights, name, x):
    mean, var, weight, bias = (weights[f'{name}.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias'))
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)


def _resnet18_by_hand(weights, hidden_fn, x, act=F.relu):
    """Five feature maps, and logits where there is a classifier. `hidden_fn` stands between two convolutions."""
    x = act(_norm(weights, 'bn1', _conv(weights, 'conv1', x, stride=2)))
    outputs = [x]
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage in range(1, 5):
        for block in (f'layer{stage}.0', f'layer{stage}.1'):
            if f'{block}.conv1.weight' not in weights:
                return outputs  # pruned
            stride = 2 if stage > 1 and block.endswith('.0') else 1
            h = hidden_fn(_norm(weights, f'{block}.bn1', _conv(weights, f'{block}.conv1', x, stride=stride)))
            h = _norm(weights, f'{block}.bn2', _conv(weights, f'{block}.conv2', h))
            if stride == 2:
                x = _norm(weights, f'{block}.downsample.1', _conv(weights, f'{block}.downsample.0', x, stride=2))
            x = act(h + x)
        outputs.append(x)
    if 'fc.weight' in weights:
        outputs.append(F.linear(x.mean((2, 3)), weights['fc.weight'], weights['fc.bias']))
    return outputs


MOBILENETV2 = [(1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)]  # blocks and stride of each stage


def _mobilenetv2_by_hand(weights, hidden_fn, x, act=F.relu6):
    """Five feature maps, and logits where there is a classifier. `hidden_fn` stands after the expansions."""
    x = act(_norm(weights, 'bn1', _conv(weights, 'conv_stem', x, stride=2)))
    outputs = []
    for stage, (depth, first_stride) in enumerate(MOBILENETV2):
        for i in range(depth):
            block, stride = f'blocks.{stage}.{i}', first_stride if i == 0 else 1
            if f'{block}.conv_dw.weight' not in weights:
                return outputs
            groups = weights[f'{block}.conv_dw.weight'].shape[0]
            if stage == 0:  # without expansion
                h = act(_norm(weights, f'{block}.bn1', _conv(weights, f'{block}.conv_dw', x, groups=groups)))
                h = _norm(weights, f'{block}.bn2', _conv(weights, f'{block}.conv_pw', h))
            else:
                h = hidden_fn(_norm(weights, f'{block}.bn1', _conv(weights, f'{block}.conv_pw', x)))
                h = _conv(weights, f'{block}.conv_dw', h, stride=stride, groups=groups)
                h = act(_norm(weights, f'{block}.bn2', h))
                h = _norm(weights, f'{block}.bn3', _conv(weights, f'{block}.conv_pwl', h))
            x = x + h if stride == 1 and x.shape == h.shape else h
        if stage in (0, 1, 2, 4, 6):  # the last stage of each resolution
            outputs.append(x)
    if 'classifier.weight' in weights:
        x = act(_norm(weights, 'bn2', _conv(weights, 'conv_head', x)))
        outputs.append(F.linear(x.mean((2, 3)), weights['classifier.weight'], weights['classifier.bias']))
    return outputs


BY_HAND = {'resnet18': _resnet18_by_hand, 'mobilenetv2_100': _mobilenetv2_by_hand}
ACTS = {None: {}, 'gelu': dict(act=F.gelu)}  # act_layer, and the argument of the networks by hand
FEATURES = (None, 'list', 'dict', 'hook', 'getter', 'fx')


def _images(in_chans=3):
    return torch.randn(2, in_chans, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _create(name, **kwargs):
    """A model with random weights, whose norms have seen `_images()`: on others, repeated squaring would overflow."""
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, dtype=torch.float64, **kwargs)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.
    with torch.no_grad():
        model(_images(kwargs.get('in_chans', 3)))
    return model.eval()


def _weights(model):
    """Weights by the names of the classifier: wrappers put it under a name, or flatten its stages."""
    return {re.sub(r'^(body|model|graph_module)\.', '', re.sub(r'^blocks_', 'blocks.', key)): value
            for key, value in model.state_dict().items()}


def _assert_gated(actual, model, base, gate, act_layer=None, tolerance=1e-9):
    """Outputs equal the gated network's by hand, and not those of the network with `act(x)` in place of its gates."""
    gated, ungated = (
        BY_HAND[base](_weights(model), fn, _images().to(actual[-1].dtype), **ACTS[act_layer])[-len(actual):]
        for fn in (lambda h: GATES[gate](h) * h, GATES[gate]))
    for got, expected in zip(actual, gated, strict=True):
        assert got.shape == expected.shape and relative_error(got, expected) < tolerance
    assert relative_error(actual[-1], ungated[-1]) > .1


@pytest.mark.parametrize('act_layer', ACTS)
@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('base', BASES)
@pytest.mark.slow
def test_variant_equals_its_definition(base, gate, act_layer):
    model = _create(f'{base}_{gate}', num_classes=10, **(dict(act_layer=act_layer) if act_layer else {}))
    x = _images()
    with torch.no_grad():
        _assert_gated([model(x)], model, base, gate, act_layer)
        _assert_gated(model.forward_intermediates(x)[1] + [model(x)], model, base, gate, act_layer)


@pytest.mark.parametrize('feature_cls', FEATURES)
@pytest.mark.parametrize('base', BASES)
@pytest.mark.slow
def test_features_of_variants_are_gated_too(base, feature_cls):
    kwargs = dict(features_only=True, **(dict(feature_cls=feature_cls) if feature_cls else {}))
    model = _create(f'{base}_gate_gelu', **kwargs)
    x = _images()
    with torch.no_grad():
        features = model(x)
    features = list(features.values()) if isinstance(features, dict) else features
    assert len(features) == 5
    _assert_gated(features, model, base, 'gate_gelu')
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert model.pretrained_cfg['architecture'] == f'{base}_gate_gelu' and 'num_classes' not in model.pretrained_cfg
    if base == 'resnet18' or feature_cls not in ('list', 'dict'):  # which timm's own mobilenetv2_100 cannot
        assert list(model.state_dict()) == list(timm.create_model(base, device='meta', **kwargs).state_dict())


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('index', [0, 3])
@pytest.mark.slow
def test_pruned_variants_are_gated(base, index):
    model = _create(f'{base}_gate_relu6')
    x = _images()
    taken = model.prune_intermediate_layers([index], prune_norm=True)
    with torch.no_grad():
        features = model.forward_intermediates(x, indices=taken, intermediates_only=True)
        by_hand = BY_HAND[base](model.state_dict(), lambda h: F.relu6(h) * h, x)
        torch.testing.assert_close(features, by_hand[index:index + 1], rtol=1e-9, atol=0)
        if index:  # the first feature map comes before any gate
            _assert_gated(features, model, base, 'gate_relu6')


@pytest.mark.filterwarnings('ignore:.*torch.jit.*deprecated')
@pytest.mark.parametrize('features', [None, 'list'])
@pytest.mark.parametrize('base', BASES)
@pytest.mark.slow
def test_scripted_variants_are_gated(base, features):
    model = _create(f'{base}_ewp', **(dict(features_only=True, feature_cls=features) if features else {}))
    x = _images()
    with torch.no_grad():
        outputs = torch.jit.script(model)(x)
    _assert_gated(outputs if features else [outputs], model, base, 'ewp')


@pytest.mark.slow
@pytest.mark.parametrize('base', BASES)
def test_fused_traced_and_exported_variants_are_gated(base):
    model = _create(f'{base}_gate_gelu')
    x = _images()
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
        for variant in (reparameterize_model(model), torch.fx.symbolic_trace(model), exported):
            _assert_gated([variant(x)], model, base, 'gate_gelu')
        compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
        _assert_gated([compiled(x)], model, base, 'gate_gelu')


@pytest.mark.slow
def test_onnx_of_a_variant_is_gated(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = _create('mobilenetv2_100_gate_gelu').float()
    x = _images().float()
    torch.onnx.export(model, (x,), tmp_path / 'model.onnx', dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    _assert_gated([torch.from_numpy(logits)], model, 'mobilenetv2_100', 'gate_gelu', tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('base', BASES)
def test_gradients_are_the_definitions(base, checkpointing):
    model = _create(f'{base}_gate_gelu')
    model.set_grad_checkpointing(checkpointing)
    weights = {key: value.detach().clone().requires_grad_('running' not in key and value.is_floating_point())
               for key, value in model.state_dict().items()}
    x = _images()
    BY_HAND[base](weights, lambda h: F.gelu(h) * h, x)[-1].square().mean().backward()
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize('base', BASES)
def test_variant_takes_what_the_original_takes(base):
    model = _create(f'{base}_ewp', in_chans=5, num_classes=7, drop_path_rate=.1, output_stride=16, global_pool='max')
    original = timm.create_model(
        base, in_chans=5, num_classes=7, drop_path_rate=.1, output_stride=16, global_pool='max', device='meta')
    assert list(model.state_dict()) == list(original.state_dict())
    assert model.feature_info == original.feature_info
    features = model.forward_features(_images(5))
    assert features.shape[2:] == (4, 4)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model(f'{base}_ewp', no_such_argument=1)


@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize('base', BASES)
@pytest.mark.slow
def test_weights_load_from_a_file(base, features_only, tmp_path):
    original = _create(base, num_classes=10)
    torch.save(original.state_dict(), tmp_path / 'weights.pth')
    model = timm.create_model(
        f'{base}_ewp', pretrained=True, features_only=features_only, dtype=torch.float64,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth'), num_classes=10))
    loaded = model.eval().state_dict()
    assert loaded and all(torch.equal(value, original.state_dict()[key]) for key, value in loaded.items())
    x = _images()
    with torch.no_grad():
        _assert_gated(model(x) if features_only else [model(x)], model, base, 'ewp')


@pytest.mark.parametrize('gate, params', [
    ('identity', 7_791_544), ('fc', 20_153_464), ('dw', 7_916_344), ('ln', 7_816_504)])
def test_parameters_of_gmnet_gates(gate, params):
    assert _params(timm.create_model('gmnet_s3', gate=gate, device='meta')) == params


@pytest.mark.parametrize('gate', ['fc', 'dw', 'ln'])
def test_gmnet_gate_equals_its_definition(gate):
    torch.manual_seed(0)
    block = GmNetBlock(8, mlp_ratio=2, gate=gate, init_values=1.).double().eval()
    h = torch.randn(2, 16, 7, 9, dtype=torch.float64)
    if gate == 'ln':
        torch.nn.init.normal_(block.gate.weight), torch.nn.init.normal_(block.gate.bias)
        mean, var = h.mean(1, keepdim=True), h.var(1, keepdim=True, correction=0)
        scale, shift = (p.view(-1, 1, 1) for p in (block.gate.weight, block.gate.bias))
        gated = (h - mean) / (var + 1e-6).sqrt() * scale + shift
    elif gate == 'fc':
        weight = block.gate.conv.weight[:, :, 0, 0]
        gated = torch.einsum('oc,bchw->bohw', weight, h) + block.gate.conv.bias.view(-1, 1, 1)
    else:
        gated = F.conv2d(h, block.gate.conv.weight, block.gate.conv.bias, padding=1, groups=16)
    seen = {}
    block.f1.register_forward_hook(lambda *_: h)
    block.g.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    block(torch.randn(2, 8, 7, 9, dtype=torch.float64))
    torch.testing.assert_close(seen['x'], F.relu6(h) * gated)


@pytest.mark.parametrize('act', ['identity', 'relu', 'gelu', 'relu6'])
def test_activations_by_name(act):
    model = timm.create_model('gmnet_s1', act_layer=act, base_dim=8, depths=(1,) * 4).eval()
    block = model.stages[0][1]
    expected = {'identity': lambda x: x, 'relu': F.relu, 'gelu': F.gelu, 'relu6': F.relu6}[act]
    x = 4 * torch.randn(100)
    torch.testing.assert_close(block.act(x), expected(x))
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize('gate', ['identity', 'fc', 'dw', 'ln'])
@pytest.mark.slow
def test_gates_fuse_script_and_compile(gate):
    torch.manual_seed(0)
    args = dict(base_dim=8, depths=(1, 1, 2, 1), gate=gate, init_values=.5, num_classes=5)
    model = randomize(timm.create_model('gmnet_s1', **args)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), expected)
        fused = reparameterize_model(copy.deepcopy(model))
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.stages.modules())


@pytest.mark.parametrize('gate', ['fc', 'dw', 'ln'])
def test_checkpoint_tells_the_gate(gate, tmp_path):
    model = timm.create_model('gmnet_s1', gate=gate, act_layer='gelu', num_classes=4).eval()
    architecture = infer_architecture(model.state_dict())
    assert architecture.gate == gate and architecture.differences('gmnet_s1') == {'gate': gate}
    torch.save(model.state_dict(), tmp_path / 'checkpoint.pth')
    loaded = load_model(str(tmp_path / 'checkpoint.pth'), model_kwargs=dict(act_layer='gelu')).model
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


def test_ablations_from_the_command_line_of_train_py():
    parser = argparse.ArgumentParser()
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=timm.utils.ParseKwargs)  # as in train.py
    args = parser.parse_args(['--model-kwargs', 'act_layer=gelu', 'gate=fc'])
    block = timm.create_model('gmnet_s1', device='meta', **args.model_kwargs).stages[0][1]
    assert 'gelu' in type(block.act).__name__.lower()
    assert block.gate.conv.weight.shape == (120, 120, 1, 1)


def test_no_such_gate():
    with pytest.raises(ValueError, match='identity, fc, dw or ln'):
        timm.create_model('gmnet_s1', gate='nonsense')
