import copy
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import SIZES, create, randomize, relative_error
from timm.models import FeatureInfo, group_parameters
from timm.optim import param_groups_layer_decay
from timm.utils import reparameterize_model

from gmnet_timm.gmnet import GmNet
from gmnet_timm.info import PAPER, count_cost

GOLDEN = Path(__file__).parent / 'golden'
EXPECTED = json.loads((GOLDEN / 'expected.json').read_text())
TRAIN_LABELS = torch.tensor([3, 977])

# Parameters and multiply-adds that the published description gives for each size.
COSTS = {
    'gmnet_s1': (3_661_600, 647_326_976),
    'gmnet_s2': (6_159_928, 881_687_808),
    'gmnet_s3': (7_791_544, 1_236_181_248),
    'gmnet_s4': (17_061_460, 2_748_046_912),
}


def _load_reference():
    spec = importlib.util.spec_from_file_location('golden_reference', GOLDEN / 'reference.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load_reference()


def golden_model(variant: str) -> torch.nn.Module:
    model = timm.create_model(f'gmnet_{variant}', dtype=torch.float64)
    model.load_state_dict(reference.official_state_dict(variant))
    return model.eval()


def close(actual, expected):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


# --- the authors' model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', ['2x96x96', '1x64x128'])
@pytest.mark.parametrize('variant', sorted(EXPECTED))
def test_inference_matches_authors(variant, shape):
    expected = EXPECTED[variant][shape]
    image = reference.image(*map(int, shape.split('x')))
    with torch.no_grad():
        model = golden_model(variant)
        logits = model(image)
        stages = model.forward_intermediates(image, intermediates_only=True)
    close(logits[:, :6], expected['logits_head'])
    close(logits.norm(), expected['logits_norm'])
    assert logits.argmax(1).tolist() == expected['argmax']
    close([stage.norm().item() for stage in stages], expected['stage_norms'])


@pytest.mark.parametrize('variant', sorted(EXPECTED))
def test_training_matches_authors(variant):
    expected = EXPECTED[variant]['train_2x64x64']
    model = golden_model(variant).train()
    loss = F.cross_entropy(model(reference.image(2, 64, 64)), TRAIN_LABELS)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    close(loss.detach(), expected['loss'])
    close(torch.cat([g.flatten() for g in grads.values()]).norm(), expected['grad_norm'])
    for name, norm in expected['grad_norms'].items():
        close(grads[name].norm(), norm)


@pytest.mark.parametrize('name', SIZES)
def test_names_and_shapes_are_the_authors(name):
    official = json.loads((GOLDEN / 'official_keys.json').read_text())[name.removeprefix('gmnet_')]
    ours = {key: list(value.shape) for key, value in timm.create_model(name, device='meta').state_dict().items()}
    assert ours == official


@pytest.mark.parametrize('name', SIZES)
def test_cost(name):
    params, macs = COSTS[name]
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == params
    assert count_cost(model, (3, 224, 224))[0] == macs
    # the paper rounds to one decimal, and gives 17.0 for 17.06
    assert params / 1e6 == pytest.approx(PAPER[name].params_m, abs=0.07)
    assert macs / 1e9 == pytest.approx(PAPER[name].gflops, abs=0.05)


def test_initialisation_is_the_authors():
    model = timm.create_model('gmnet_s3')
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Conv2d):  # PyTorch's default: uniform within 1 / sqrt(fan in)
            bound = 1 / math.sqrt(m.weight[0].numel())
            assert m.weight.abs().max() <= bound and m.bias.abs().max() <= bound, name
            assert m.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
        elif isinstance(m, torch.nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (model.head.bias == 0).all()
    gammas = [p for name, p in model.named_parameters() if name.endswith('gamma')]
    assert len(gammas) == 17 and all((p == 1e-6).all() for p in gammas)


# --- the contract of timm's models ----------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 224), (250, 100), (129, 257)])
def test_any_input_size(size):
    model = create()
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, *size))
        assert model(torch.randn(2, 3, *size)).shape == (2, 1000)
    assert features.shape == (2, 320, *(math.ceil(s / 32) for s in size))


def test_in_chans_and_num_classes():
    model = create(in_chans=5, num_classes=7)
    assert model(torch.randn(2, 5, 32, 32)).shape == (2, 7)
    assert (model.in_chans, model.num_classes) == (5, 7)


def test_no_classifier():
    model = create(num_classes=0)
    x = torch.randn(2, 3, 64, 64)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    torch.testing.assert_close(model(x), model.forward_features(x).mean((2, 3)))


POOLS = {
    'avg': lambda x: x.mean((2, 3)),
    'max': lambda x: x.amax((2, 3)),
    'avgmax': lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2,
    'catavgmax': lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1),
}


@pytest.mark.parametrize('global_pool', POOLS)
def test_global_pool(global_pool):
    x = torch.randn(2, 3, 64, 96)
    for model in (create(global_pool=global_pool, num_classes=7), create(num_classes=7)):
        model.reset_classifier(7, global_pool)
        pooled = POOLS[global_pool](model.forward_features(x))
        assert pooled.shape[1] == model.head_hidden_size
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
        torch.testing.assert_close(model(x), F.linear(pooled, model.head.weight, model.head.bias))


def test_no_global_pool():
    model = create(num_classes=0, global_pool='')
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(model(x), model.forward_features(x))
    assert model(x).shape == (2, 320, 2, 3)


def test_drop_rate():
    model = create(drop_rate=0.5, num_classes=0)
    features = torch.ones(64, 320, 1, 1)
    assert (model.forward_head(features) == 1).all()  # off in evaluation
    dropped = model.train().forward_head(features)
    assert set(dropped.unique().tolist()) == {0., 2.}
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_drop_path_rate():
    model = timm.create_model('gmnet_s3', drop_path_rate=0.16)
    rates = [getattr(block.drop_path, 'drop_prob', 0.) for stage in model.stages for block in list(stage)[1:]]
    torch.testing.assert_close(rates, [0.01 * i for i in range(17)])  # linear over the 17 blocks
    x = torch.randn(2, 3, 32, 32)
    for rate in (0., 0.5):  # drawn anew each time in training, off in evaluation
        model = create(drop_path_rate=rate)
        assert torch.equal(model(x), model(x))
        model.train()
        assert torch.equal(model(x), model(x)) == (rate == 0.)


@pytest.mark.parametrize('name, fn', [
    ('relu', F.relu), ('gelu', F.gelu), ('silu', F.silu), ('relu6', F.relu6), ('hard_swish', F.hardswish),
])
def test_act_layer_by_name(name, fn):
    block = create(act_layer=name).stages[1][2]
    x = torch.randn(1, 80, 8, 8) * 4
    hidden = block.f1(block.dwconv(x))
    branch = block.dwconv2(block.g(fn(hidden) * hidden))
    torch.testing.assert_close(block(x), x + branch * block.gamma[:, None, None])


NO_LAYER_SCALE = [0, False, None]


def without_layer_scale(init_values=0, **kwargs) -> torch.nn.Module:
    """GmNet-S3 in float64. `create_model` takes None for an argument that is not given, so None goes to the class."""
    kwargs = dict(kwargs, init_values=init_values, dtype=torch.float64)
    return (GmNet(**kwargs) if init_values is None else timm.create_model('gmnet_s3', **kwargs)).eval()


def absorb_layer_scale(state_dict: dict) -> dict:
    """The same network without layer scales, written out: they scale what the last convolution of a block gives."""
    absorbed = {key: value for key, value in state_dict.items() if not key.endswith('.gamma')}
    for key, gamma in state_dict.items():
        if key.endswith('.gamma'):
            conv = key.replace('gamma', 'dwconv2.conv')
            absorbed[f'{conv}.weight'] = state_dict[f'{conv}.weight'] * gamma.view(-1, 1, 1, 1)
            absorbed[f'{conv}.bias'] = state_dict[f'{conv}.bias'] * gamma
    return absorbed


@pytest.mark.parametrize('init_values', NO_LAYER_SCALE)
def test_no_layer_scale_matches_authors(init_values):
    model = without_layer_scale(init_values)
    official = reference.official_state_dict('s3')
    assert list(model.state_dict()) == [key for key in official if not key.endswith('.gamma')]
    model.load_state_dict(absorb_layer_scale(official))
    with torch.no_grad():
        logits = model(reference.image(2, 96, 96))
    close(logits[:, :6], EXPECTED['s3']['2x96x96']['logits_head'])
    close(logits.norm(), EXPECTED['s3']['2x96x96']['logits_norm'])


@pytest.mark.slow
def test_no_layer_scale_is_a_scale_of_one():
    scaled, model = timm.create_model('gmnet_s3', init_values=1., dtype=torch.float64).eval(), without_layer_scale()
    gammas = {key: value for key, value in scaled.state_dict().items() if key.endswith('.gamma')}
    assert len(gammas) == 17 and all((gamma == 1).all() for gamma in gammas.values())
    missing, unexpected = model.load_state_dict(scaled.state_dict(), strict=False)
    assert not missing and unexpected == list(gammas)
    for m in (scaled, model):
        m.train()(reference.image(2, 64, 64)).square().mean().backward()
    for name, p in model.named_parameters():
        close(p.grad, scaled.get_parameter(name).grad)
    with torch.no_grad():
        close(model.eval()(reference.image(2, 96, 96)), scaled.eval()(reference.image(2, 96, 96)))


@pytest.mark.filterwarnings('ignore:.*torch.jit.*deprecated')
@pytest.mark.slow
def test_no_layer_scale_fuses_and_scripts():
    model = randomize(without_layer_scale(num_classes=10))
    x = reference.image(2, 64, 64)
    with torch.no_grad():
        expected = model(x)
        fused = reparameterize_model(model)
        for variant in (fused, torch.jit.script(model), torch.jit.script(fused), torch.fx.symbolic_trace(model)):
            assert relative_error(variant(x), expected) < 1e-12
    assert [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)] == [fused.norm]
    assert not any(block.gamma is not None for stage in fused.stages for block in list(stage)[1:])


def test_checkpoints_with_and_without_layer_scale_are_told_apart(tmp_path):
    model, x = randomize(without_layer_scale()), reference.image(1, 64, 64)
    torch.save(model.state_dict(), tmp_path / 'without.pth')
    torch.save(reference.official_state_dict('s3'), tmp_path / 'with.pth')
    kwargs = dict(dtype=torch.float64, checkpoint_path=str(tmp_path / 'without.pth'))
    loaded = timm.create_model('gmnet_s3', init_values=0, **kwargs).eval()
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(RuntimeError, match='Missing key.*gamma'):
        timm.create_model('gmnet_s3', **kwargs)
    with pytest.raises(RuntimeError, match='Unexpected key.*gamma'):
        timm.create_model('gmnet_s3', init_values=0, checkpoint_path=str(tmp_path / 'with.pth'))


def test_unknown_argument_raises():
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model('gmnet_s1', no_such_argument=1)


def test_impossible_output_stride_raises():
    with pytest.raises(ValueError, match='8, 16 or 32'):
        timm.create_model('gmnet_s1', output_stride=4)


@pytest.mark.parametrize('feature_cls, out_indices', [
    ('list', (0, 1, 2, 3)), ('list', (0,)), ('dict', (1, 3)), ('hook', (1, 3)), ('getter', (1, 3)), ('fx', (1, 3))])
def test_features_only(feature_cls, out_indices):
    model = create(features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    plain = create()
    # extractors flatten `stages.0` to `stages_0`, or wrap the model
    weights = {re.sub(r'^(model|graph_module)\.', '', re.sub(r'^(stem|stages)_', r'\1.', k)): v
               for k, v in model.state_dict().items()}
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    x = torch.randn(2, 3, 65, 96)
    with torch.no_grad():
        actual = model(x)
        expected = plain.forward_intermediates(x, indices=list(out_indices), intermediates_only=True)
    actual = list(actual.values()) if isinstance(actual, dict) else actual
    torch.testing.assert_close(actual, expected)
    assert model.feature_info.channels() == [[40, 80, 160, 320][i] for i in out_indices]
    assert model.feature_info.reduction() == [[4, 8, 16, 32][i] for i in out_indices]


def test_features_only_negative_index():
    x = torch.randn(1, 3, 64, 64)
    features = create(features_only=True, out_indices=(-2, -1))(x)
    assert [f.shape[1:] for f in features] == [(160, 4, 4), (320, 2, 2)]


@pytest.mark.parametrize('name', [SIZES[0], pytest.param(SIZES[-1], marks=pytest.mark.slow)])
def test_forward_intermediates_contract(name):
    """Intermediates are what leaves the stages, agree with feature_info, and end in forward_features."""
    model = create(name)
    x = torch.randn(1, 3, 96, 96)
    hooked = []
    handles = [stage.register_forward_hook(lambda m, i, o: hooked.append(o)) for stage in model.stages]
    with torch.no_grad():
        final, intermediates = model.forward_intermediates(x)
        for handle in handles:
            handle.remove()
        info = FeatureInfo(model.feature_info, len(model.feature_info))
        assert [i.shape[1] for i in intermediates] == info.channels()
        assert [96 // i.shape[2] for i in intermediates] == info.reduction()
        assert all(torch.equal(a, b) for a, b in zip(intermediates, hooked))
        torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)

        for index in range(4):
            only = model.forward_intermediates(x, indices=[index], stop_early=True, intermediates_only=True)
            assert len(only) == 1 and torch.equal(only[0], intermediates[index])
        assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert torch.equal(normed[-1], final) and torch.equal(normed[0], intermediates[0])

        model.set_grad_checkpointing()
        torch.testing.assert_close(model.forward_intermediates(x)[0], final)
    with pytest.raises(AssertionError, match='NCHW'):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('name', [SIZES[0], pytest.param(SIZES[-1], marks=pytest.mark.slow)])
def test_prune_intermediate_layers_contract(name):
    """Pruned models give the same intermediates, end at the last one kept, keep no unused parameter and train."""
    model = create(name)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, stages = model(x), model.forward_intermediates(x, intermediates_only=True)
        whole = copy.deepcopy(model)
        assert whole.prune_intermediate_layers([3], prune_head=False) == [3]
        torch.testing.assert_close(whole(x), logits, rtol=0, atol=0)
        whole.prune_intermediate_layers([3], prune_norm=True)
        torch.testing.assert_close(whole(x), stages[3], rtol=0, atol=0)
    for index in range(4):
        pruned = copy.deepcopy(model)
        taken = pruned.prune_intermediate_layers([index], prune_norm=True)
        assert len(pruned.stages) == index + 1
        with torch.no_grad():
            kept = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
            assert torch.equal(kept[0], stages[index])
            assert torch.equal(pruned.forward_features(x), stages[index])
        pruned.train().forward_features(x).sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())
        pruned.reset_classifier(5, 'avg')
        assert pruned(x).shape == (2, 5)
        assert pruned.head_hidden_size == stages[index].shape[1]


def test_reset_classifier():
    model = create(dtype=torch.float64, global_pool='max').train()
    features = model.forward_features(torch.randn(2, 3, 32, 32, dtype=torch.float64)).detach()
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model.global_pool.pool_type == 'max'
    assert model.head.weight.dtype == torch.float64 and model.head.training
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1) and (model.head.bias == 0).all()
    assert model.forward_head(features).shape == (2, 5)
    model.reset_classifier(0)
    torch.testing.assert_close(model.forward_head(features), features.amax((2, 3)))


def test_grad_checkpointing_gives_the_same_gradients():
    model = create().train()
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    for m in (model, checkpointed):
        m(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_layer_decay_groups_follow_depth():
    model = timm.create_model('gmnet_s3')
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group['lr_scale'] for group in groups for p in group['params']}
    assert len(scale) == len(names)
    # a layer each for the stem, every down-sampling and every block; the norm goes with the last one
    layers = ['stem.0.conv.weight']
    layers += [f'stages.{i}.{j}.{"0.conv" if j == 0 else "f1.conv"}.weight'
               for i, depth in enumerate((3, 3, 8, 3)) for j in range(depth + 1)]
    layers.append('head.weight')
    assert [scale[name] for name in layers] == [0.5 ** i for i in reversed(range(len(layers)))]
    assert scale['norm.weight'] == scale['stages.3.3.f1.conv.weight']
    decayed = {names[id(p)] for group in groups if group['weight_decay'] > 0 for p in group['params']}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 6  # stem, four stages, head


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_device_and_dtype_at_construction(dtype):
    model = timm.create_model('gmnet_s1', device='meta', dtype=dtype)
    assert all(p.device.type == 'meta' and p.dtype == dtype for p in model.parameters())
    assert timm.create_model('gmnet_s1', dtype=dtype).eval()(torch.randn(1, 3, 32, 32, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride_computes_the_same_features_denser(output_stride):
    """Dilation in place of stride: every 32 / output_stride-th position is what the strided network computes there."""
    model, dilated = create(), timm.create_model('gmnet_s1', output_stride=output_stride).eval()
    dilated.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 128, 96)
    step = 32 // output_stride
    with torch.no_grad():
        expected, actual = model.forward_features(x), dilated.forward_features(x)
    assert actual.shape[2:] == (128 // output_stride, 96 // output_stride)
    torch.testing.assert_close(actual[:, :, ::step, ::step], expected, rtol=1e-4, atol=1e-4)
    assert [f['reduction'] for f in dilated.feature_info] == [min(r, output_stride) for r in (4, 8, 16, 32)]
