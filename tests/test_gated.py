import argparse
import copy

import pytest
import timm
import timm.utils
import torch
import torch.nn.functional as F
from conftest import randomize
from timm.utils import reparameterize_model

from gmnet_timm.checkpoint.architecture import infer_architecture, load_model
from gmnet_timm.gmnet import GmNetBlock

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


def _resnet18_by_hand(model, gate, x):
    """The variant written out from its definition, with the weights of timm's original."""
    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            shortcut = x if block.downsample is None else block.downsample(x)
            h = block.bn1(block.conv1(x))
            h = block.bn2(block.conv2(gate(h) * h))
            x = F.relu(h + shortcut)
    return model.fc(x.mean((2, 3)))


def _mobilenetv2_by_hand(model, gate, x):
    def norm(bn, x):  # without the activation that timm's norm carries
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0., bn.eps)

    x = F.relu6(norm(model.bn1, model.conv_stem(x)))
    for stage in model.blocks:
        for block in stage:
            if hasattr(block, 'conv_pwl'):
                h = norm(block.bn1, block.conv_pw(x))
                h = F.relu6(norm(block.bn2, block.conv_dw(gate(h) * h)))
                h = norm(block.bn3, block.conv_pwl(h))
            else:  # the first block has no expansion, and keeps its activation
                h = F.relu6(norm(block.bn1, block.conv_dw(x)))
                h = norm(block.bn2, block.conv_pw(h))
            x = x + h if block.has_skip else h
    x = F.relu6(norm(model.bn2, model.conv_head(x)))
    return model.classifier(x.mean((2, 3)))


@pytest.mark.parametrize('base, by_hand', [('resnet18', _resnet18_by_hand), ('mobilenetv2_100', _mobilenetv2_by_hand)])
@pytest.mark.parametrize('gate', GATES)
def test_variant_equals_its_definition(base, by_hand, gate):
    torch.manual_seed(0)
    original = randomize(timm.create_model(base, num_classes=10)).double().eval()
    gated = timm.create_model(f'{base}_{gate}', num_classes=10).double().eval()
    gated.load_state_dict(original.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = by_hand(original, GATES[gate], x)
        torch.testing.assert_close(gated(x), expected, rtol=1e-9, atol=0)
        assert not torch.allclose(original(x), expected, rtol=1e-2)


def test_features_of_variants_are_gated_too():
    for base in BASES:
        names = [type(m).__name__ for m in timm.create_model(f'{base}_ewp', features_only=True).modules()]
        assert 'Gate' in names


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
    assert architecture.gate == gate and architecture.model_name is None
    assert f'gate {gate} instead of identity' in architecture.describe()
    assert f"timm.create_model('gmnet_s1', in_chans=3, num_classes=4, gate='{gate}')" in architecture.describe()
    torch.save(model.state_dict(), tmp_path / 'checkpoint.pth')
    loaded = load_model(tmp_path / 'checkpoint.pth', act_layer='gelu')
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
