"""Which gates a model has, found by what it computes: one way for every use, however the product is written."""
import copy
import importlib
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import create
from timm.utils import reparameterize_model
from torch import nn

import gmnet_timm.gmnet
from gmnet_timm.errors import UserError
from gmnet_timm.frequency import find_gates, find_products
from gmnet_timm.frequency.tracing import Recorder, trace

COUNTS = {  # gates, and products with a broadcast factor
    'gmnet_s1': (16, 0),
    'starnet_s1': (15, 0),
    'eva02_tiny_patch14_224': (12, 0),  # SwiGLU
    'gmlp_s16_224': (30, 0),  # spatial gating units
    'mobilenetv3_small_100': (0, 9),  # squeeze-and-excitation
    'efficientnet_b0': (0, 16),
    'resnet18': (0, 0),
    'vit_tiny_patch16_224': (0, 0),
    'convnext_atto': (0, 0),
    'resnet18_gate_gelu': (8, 0),
    'mobilenetv2_100_ewp': (16, 0),
}


class Net(nn.Module):
    """A convolution, whose output x and a function of it meet in `product`."""

    def __init__(self, product):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.weight = nn.Parameter(torch.ones(4, 1, 1))
        self.product = product

    def forward(self, x):
        return self.last(self.product(self, self.conv(x)))


class Twice(nn.Module):
    def forward(self, x):
        x = x * x.sigmoid()
        return x * x


def _kinds(product):
    """Kinds of what a network with this product multiplies, by name; the pass that looks for layouts finds the same."""
    net, x = Net(product), torch.randn(1, 3, 8, 8)
    kinds = {name: found.kind for name, found in find_products(net, x).items()}
    assert {name: found.kind for name, found in trace(net.eval(), x).products.items()} == kinds
    return kinds


@pytest.mark.parametrize('name', COUNTS)
@pytest.mark.slow
def test_counts_of_known_models(name):
    products = find_products(timm.create_model(name, device='meta'))
    gates = [name for name, product in products.items() if product.kind == 'gate']
    assert (len(gates), len(products) - len(gates)) == COUNTS[name]
    assert list(find_gates(timm.create_model(name, device='meta'))) == gates


def test_names_are_those_of_the_modules_that_multiply():
    gmnet = find_gates(timm.create_model('gmnet_s1', device='meta'))
    assert list(gmnet) == [f'stages.{i}.{j + 1}' for i, depth in enumerate((2, 2, 10, 2)) for j in range(depth)]
    resnet = find_gates(timm.create_model('resnet18_gate_relu6', device='meta'))
    assert list(resnet) == [f'layer{i}.{j}.act1' for i in (1, 2, 3, 4) for j in (0, 1)]
    assert 'blocks.0.0.se' in find_products(timm.create_model('mobilenetv3_small_100', device='meta'))


def _into_part(x):
    y = torch.zeros_like(x)
    y[:, 2:] += x[:, 2:]
    return y


@pytest.mark.parametrize('product', [
    lambda net, x: x * x,
    lambda net, x: x ** 2,
    lambda net, x: torch.square(x),
    lambda net, x: x.clone().square_(),
    lambda net, x: F.relu6(x) * x,
    lambda net, x: F.relu(x.clone(), inplace=True) * x,
    lambda net, x: torch.mul(x, x.sigmoid()),
    lambda net, x: torch.mul(x, x.sigmoid(), out=torch.empty_like(x)),
    lambda net, x: torch.multiply(x, x.sigmoid()),
    lambda net, x: x.mul(other=x.sigmoid()),
    lambda net, x: x.clone().mul_(x),
    lambda net, x: x.mul_(x.sigmoid()),
    lambda net, x: torch.einsum('bchw,bchw->bchw', x, x.tanh()),
    lambda net, x: torch.einsum('bchw,bchw->bhwc', x, x.tanh()).permute(0, 3, 1, 2),
    lambda net, x: torch.addcmul(x, x, x.sigmoid()),
    lambda net, x: torch.lerp(x, x.exp(), x.sigmoid()),
    lambda net, x: F.glu(torch.cat([x, x], 1), 1),
    lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1) * x,
    lambda net, x: (net.weight * x) * (x + 1),
    lambda net, x: x.transpose(2, 3).reshape(x.shape) * x,
    lambda net, x: (x.double() * x.double().cos()).float(),
    lambda net, x: x * _into_part(x),
    lambda net, x: x * F.interpolate(F.avg_pool2d(x, 4), scale_factor=4),  # varies over the map
    lambda net, x: (x * x).mean((2, 3), keepdim=True),  # features, not a statistic
], ids=lambda product: None)
def test_gates(product):
    assert _kinds(product) == {'': 'gate'}


@pytest.mark.parametrize('product', [
    lambda net, x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    lambda net, x: x * x.mean((2, 3), keepdim=True).expand_as(x),
    lambda net, x: x * x.mean((2, 3), keepdim=True).expand_as(x).clone(),
    lambda net, x: x * x.mean((2, 3), keepdim=True).expand_as(x).sigmoid(),
    lambda net, x: x * x.mean((2, 3), keepdim=True).repeat(1, 1, *x.shape[2:]),
    lambda net, x: x * F.interpolate(x.mean((2, 3), keepdim=True), x.shape[2:]),
    lambda net, x: torch.einsum('bchw,bc->bchw', x, x.mean((2, 3))),
    lambda net, x: x * x.mean(1, keepdim=True),
    lambda net, x: x * x.mean(),
    lambda net, x: x.mul_(x.amax((2, 3), keepdim=True)),
])
def test_broadcast_factors_are_told_apart(product):
    assert _kinds(product) == {'': 'attention'}


@pytest.mark.parametrize('product', [
    lambda net, x: x,
    lambda net, x: 2 * x,
    lambda net, x: x * torch.tensor(2.),
    lambda net, x: x * net.weight,
    lambda net, x: torch.mul(net.weight, x).mul_(.5),
    lambda net, x: x * torch.ones_like(x) * x.new_ones(x.shape) * torch.rand_like(x),
    lambda net, x: x * x.clone().fill_(2.) * x.clone().normal_() * torch.empty_like(x).bernoulli_(),
    lambda net, x: x * x.clone().copy_(net.weight),
    lambda net, x: x * torch.arange(x.shape[3]),
    lambda net, x: x + F.gelu(x) - F.silu(x),
    lambda net, x: x + (x > 0) * (x < 1),
    lambda net, x: (net.weight * net.weight) + x,
    lambda net, x: x / ((x - x.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True).add(1e-5).sqrt(),
])
def test_what_is_not_a_product_of_features(product):
    assert _kinds(product) == {}


@pytest.mark.parametrize('product, kinds', [
    (lambda net, x: x * (x ** 2).mean(1, keepdim=True).add(1e-6).rsqrt(), ['attention']),  # RMSNorm
    (lambda net, x: (x * x) * (x * x).sum(1, keepdim=True).pow(-.5), ['gate', 'attention']),
    (lambda net, x: (lambda y: y * y.mean((2, 3), keepdim=True).sqrt())(x * x), ['gate', 'attention']),
])
def test_squares_for_a_statistic(product, kinds):
    assert list(_kinds(product).values()) == kinds


def test_operands_and_activation():
    """Also where an operand is overwritten."""
    found = []
    for product in (lambda net, x: x.mul_(x.sigmoid()), lambda net, x: x * x.sigmoid(), lambda net, x: x.sigmoid() * x):
        net, x = Net(product), torch.randn(2, 3, 8, 8)
        recorder = Recorder(net, found.append)
        with torch.no_grad(), recorder.hooked(lambda *_: None, []), recorder.watch(x):
            net(x)
            h = net.conv(x)
        gate = found.pop()
        torch.testing.assert_close((gate.gate, gate.value, gate.product), (h.sigmoid(), h, h.sigmoid() * h))
        assert gate.pre_gate is gate.value
        torch.testing.assert_close(gate.function(h), h.sigmoid())


def test_an_activation_whose_input_was_overwritten():
    found = []
    net, x = Net(lambda net, x: (lambda gate: gate * x.add_(1))(x.sigmoid())), torch.randn(2, 3, 8, 8)
    recorder = Recorder(net, found.append)
    with torch.no_grad(), recorder.hooked(lambda *_: None, []), recorder.watch(x):
        net(x)
    assert found[0].pre_gate is None


def test_activations_on_request():
    """They do not change the names of products."""
    net = Net(lambda net, x: (F.gelu(x) + F.relu(x)) * F.relu(x.clone(), inplace=True))
    products = trace(net, torch.randn(1, 3, 8, 8), activations=True).products
    assert {name: found.kind for name, found in products.items()} == {
        ':gelu': 'activation', ':relu': 'activation', ':relu#2': 'activation', '': 'gate'}
    assert all(found.layout.name == 'NCHW' for found in products.values())
    resnet = timm.create_model('test_resnet').eval()  # its activations work in place
    assert len(trace(resnet, torch.randn(1, 3, 64, 64), activations=True).products) > 5


def test_drop_path_is_not_a_gate():
    model = timm.create_model('gmnet_s1', drop_path_rate=.5, drop_rate=.5, device='meta').train()
    assert len(find_products(model)) == 16


def test_several_products_of_one_module():
    net = nn.Sequential(Twice(), nn.Identity())
    assert list(find_gates(net, torch.zeros(1, 3, 4, 4))) == ['0', '0#2']
    shared = Twice()
    assert list(find_gates(nn.Sequential(shared, shared), torch.zeros(1, 3, 4, 4))) == ['0', '0#2', '0#3', '0#4']


# --- by what they compute, wherever the code comes from --------------------------------------------------------------


@pytest.fixture
def gmnet_from_elsewhere(tmp_path, monkeypatch):
    """gmnet.py under another name, as timm would ship it: none of its classes are ours."""
    package = tmp_path / 'elsewhere'
    package.mkdir()
    (package / '__init__.py').touch()
    (package / '_registry.py').write_text('def generate_default_cfgs(cfgs): ...\ndef register_model(fn): return fn\n')
    source = Path(gmnet_timm.gmnet.__file__).read_bytes()
    (package / 'gmnet.py').write_bytes(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module('elsewhere.gmnet')
    for name in ('elsewhere', 'elsewhere._registry', 'elsewhere.gmnet'):
        sys.modules.pop(name)


@pytest.mark.parametrize('gate', ['identity', 'fc', 'dw', 'ln'])
@pytest.mark.slow
def test_gmnet_from_elsewhere(gmnet_from_elsewhere, gate):
    args = dict(base_dim=40, depths=(2, 2, 10, 2), mlp_ratios=(3, 3, 3, 2), gate=gate)
    theirs = gmnet_from_elsewhere.GmNet(**args, device='meta')
    assert not isinstance(theirs, gmnet_timm.gmnet.GmNet)
    ours = find_gates(timm.create_model('gmnet_s1', gate=gate, device='meta'))
    assert list(find_gates(theirs)) == list(ours) and len(ours) == 16


@pytest.mark.parametrize('name, gates, feature_cls, prefix', [
    ('gmnet_s1', 16, 'list', ''), ('gmnet_s1', 16, 'dict', ''), ('gmnet_s1', 16, 'hook', ''),
    ('gmnet_s1', 16, 'getter', 'model.'), ('gmnet_s1', 16, 'fx', 'graph_module.'),
    ('resnet18_ewp', 8, 'hook', ''), ('mobilenetv2_100_gate_gelu', 16, 'list', '')])
def test_feature_extractors(name, gates, feature_cls, prefix):
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls)
    found = find_gates(model, torch.zeros(1, 3, 64, 64))
    assert len(found) == gates and all(key.startswith(prefix) for key in found)
    if name == 'gmnet_s1' and prefix:
        assert [key.removeprefix(prefix) for key in found] == list(find_gates(timm.create_model(name, device='meta')))


def test_graphs_compiled_and_fused_models():
    model = create(init_values=.5)
    x = torch.zeros(1, 3, 64, 64)
    names = list(find_gates(model))
    assert list(find_gates(torch.fx.symbolic_trace(model), x)) == names
    assert list(find_gates(reparameterize_model(model), x)) == names
    assert list(find_gates(torch.compile(model, backend='eager'), x)) == names


@pytest.mark.filterwarnings('ignore:.*torch.jit.*deprecated')
@pytest.mark.slow
def test_torchscript_is_refused():
    with pytest.raises(UserError, match='before scripting'):
        find_gates(torch.jit.script(timm.create_model('gmnet_s1')))


# --- a pass that leaves no trace -------------------------------------------------------------------------------------


def test_model_is_left_as_it_was():
    model = timm.create_model('gmnet_s1', drop_path_rate=.1).train()
    model.stages[1].eval()
    modes = [m.training for m in model.modules()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(find_gates(model)) == 16
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError):
        find_gates(model, torch.zeros(1, 5, 64, 64))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('kwargs', [dict(in_chans=5), dict(dtype=torch.float64), dict(dtype=torch.bfloat16)])
def test_default_input_suits_the_model(kwargs):
    assert len(find_gates(timm.create_model('gmnet_s1', **kwargs))) == 16
