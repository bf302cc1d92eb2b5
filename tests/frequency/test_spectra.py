import csv
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.frequency import LayerSpectrum, Signal, layer_spectra, list_layers, radial_power_spectrum
from gmnet_timm.frequency.split import bin_power, power_spectrum


def _tiny_gmnet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 2, 1), num_classes=3, **kwargs).eval()


def _batches(*sizes, side=64, channels=3):
    return [(torch.randn(n, channels, side, side), torch.zeros(n, dtype=torch.long)) for n in sizes]


def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _numpy_spectrum(maps):
    """Mean over channels of the whole FFT's power by rounded radius, (B, bins)."""
    height, width = maps.shape[-2:]
    power = (np.abs(np.fft.fft2(maps.detach().double().numpy()) / (height * width)) ** 2).mean(1)
    radius = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) * n for n in (height, width)), indexing='ij'))
    index = np.floor(radius + .5).astype(int).ravel()
    return torch.from_numpy(np.stack([np.bincount(index, p.ravel()) for p in power]))


def _assert_power(signal, maps):
    assert signal.size == tuple(maps.shape[-2:])
    torch.testing.assert_close(signal.power, _numpy_spectrum(maps), rtol=1e-3, atol=1e-9)


# --- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('gate', ['identity', 'fc', 'dw', 'ln'])
def test_both_operands_and_the_product_of_gmnet(gate):
    model, batches = _tiny_gmnet(gate=gate), _batches(3, 2)
    layers = layer_spectra(model, batches, channels=None)
    assert [layer.name for layer in layers] == ['stages.0.1', 'stages.1.1', 'stages.2.1', 'stages.2.2', 'stages.3.1']
    with torch.no_grad():  # the first gate, computed from the network's definition
        x = torch.cat([images for images, _ in batches])
        block = model.stages[0][1]
        h = block.f1(block.dwconv(model.stages[0][0](model.stem(x))))
        value = block.gate(h)
    _assert_power(layers[0].signals['gate'], h.clamp(0, 6))
    _assert_power(layers[0].signals['value'], value)
    _assert_power(layers[0].signals['product'], h.clamp(0, 6) * value)
    statistics = layers[0].statistics
    assert statistics.pre_gate_std == pytest.approx(h.std().item(), rel=1e-3)
    assert statistics.value_std == pytest.approx(value.std().item(), rel=1e-3)
    assert statistics.clipped_low == pytest.approx((h <= 0).float().mean().item(), rel=1e-6)
    assert statistics.theory == ('gaussian' if gate == 'identity' else 'independent')


def test_starnets_product_by_hand():
    torch.manual_seed(0)
    model, batches = timm.create_model('starnet_s1').eval(), _batches(2)
    with torch.no_grad():
        block = model.stages[0][1]
        h = block.dwconv(model.stages[0][0](model.stem(batches[0][0])))
        gate, value = F.relu6(block.f1(h)), block.f2(h)
    layers = layer_spectra(model, batches, channels=None)
    assert len(layers) == 15
    for name, x in (('gate', gate), ('value', value), ('product', gate * value)):
        _assert_power(layers[0].signals[name], x)
    assert layers[0].statistics.pre_gate_std == pytest.approx(block.f1(h).std().item(), rel=1e-3)
    assert layers[0].statistics.theory == 'independent'


class _Gate(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(self.conv.weight)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


def _statistics(function, images, **kwargs):
    layer, = layer_spectra(_Gate(function), [(images, None)], **kwargs)
    return layer


def _wave(frequency, size=32):
    return torch.cos(2 * math.pi * frequency * torch.arange(size) / size).expand(1, 1, size, size).clone()


@pytest.mark.parametrize('frequency, aliased', [(3, 0.), (7, 0.), (9, 1.), (15, 1.)])
def test_aliased_energy_of_a_squared_tone(frequency, aliased):
    """x * x is at twice the frequency, which folds back from half of the Nyquist frequency on."""
    statistics = _statistics(lambda x: x * x, _wave(frequency)).statistics
    assert statistics.aliased == pytest.approx(aliased, abs=1e-6)
    assert statistics.gain == pytest.approx(1 / 4, rel=1e-5)  # (1/8) / (1/2)


def test_aliased_energy_of_two_tones():
    """cos a cos b has half of its energy at b - a and half at a + b."""
    images = torch.cat([_wave(5), _wave(13)], 1).requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), Product())
    nn.init.eye_(model[0].weight[:, :, 0, 0])
    nn.init.zeros_(model[0].bias)
    layer, = layer_spectra(model, [(images, None)])
    assert layer.statistics.aliased == pytest.approx(.5, abs=1e-6)


class Product(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return a * b


def test_clipped_shares():
    images = torch.linspace(-3, 9, 32 * 32).view(1, 1, 32, 32)
    statistics = _statistics(lambda x: F.relu6(x) * x, images).statistics
    assert (statistics.clipped_low, statistics.clipped_high) == pytest.approx((.25, .25), abs=.01)
    statistics = _statistics(lambda x: F.gelu(x) * x, images).statistics
    assert statistics.clipped_low == statistics.clipped_high == 0
    statistics = _statistics(lambda x: torch.sigmoid(40 * x) * x, images).statistics
    assert statistics.clipped_high == pytest.approx(.71, abs=.02)  # float32 ends at 40 x = 17


def _one_over_f(count, size, scale):
    v, u = torch.fft.fftfreq(size, d=1 / size), torch.fft.rfftfreq(size, d=1 / size)
    amplitude = 1 / (v[:, None] ** 2 + u ** 2).sqrt().clamp(min=1)
    amplitude[0, 0] = 0
    fields = torch.fft.irfft2(torch.fft.rfft2(torch.randn(count, 1, size, size)) * amplitude, s=(size, size))
    return fields * scale / fields.std()


@pytest.mark.parametrize('function, ratio', [
    (lambda x: F.relu6(x) * x, .396), (lambda x: F.gelu(x) * x, .414), (lambda x: x * x, .551)])
def test_prediction_beside_the_measurement(function, ratio):
    """Gaussian maps with a 1/f amplitude spectrum: spec of the theory, and what is measured on the same maps."""
    images = _one_over_f(200, 64, 1.4)
    layer = _statistics(function, images)
    product, predicted = layer.signals['product'], bin_power(layer.statistics.predicted, 64, 64)
    measured = product.power.mean(0)
    assert (measured[17:].sum() / measured[1:17].sum()).item() == pytest.approx(ratio, rel=.05)
    assert product.high == pytest.approx(layer.predicted_high, rel=.05)
    assert (predicted[17:].sum() / predicted[1:17].sum()).item() == pytest.approx(ratio, rel=.05)
    assert ((predicted - measured) / measured)[4:33].abs().max() < .15


def test_activation_as_a_gate():
    images = torch.randn(2, 1, 16, 16)
    layer = _statistics(F.gelu, images, kinds=['activation'])
    assert layer.kind == 'activation'
    phi = .5 * (1 + torch.erf(images / math.sqrt(2)))
    _assert_power(layer.signals['gate'], phi)
    _assert_power(layer.signals['product'], images * phi)


@pytest.mark.parametrize('function', [
    lambda x: x.clone().mul_(torch.sigmoid(x)),
    lambda x: torch.mul(torch.sigmoid(x), x),
    lambda x: F.glu(torch.cat([x, x], 1), 1),
    lambda x: torch.einsum('bchw,bchw->bchw', x, torch.sigmoid(x)),
], ids=['in place', 'mul', 'glu', 'einsum'])
def test_one_product_written_in_several_ways(function):
    images = torch.randn(2, 1, 16, 16)
    layer = _statistics(function, images)
    for name, x in (('gate', images.sigmoid()), ('value', images), ('product', images * images.sigmoid())):
        _assert_power(layer.signals[name], x)
    assert layer.statistics.pre_gate_std == pytest.approx(images.std(correction=0).item(), rel=1e-4)


def test_clipped_shares_do_not_depend_on_the_batches():
    images = torch.cat([torch.linspace(-3, 2, 512), torch.linspace(1, 9, 512)]).view(2, 1, 16, 32)
    whole, parts = (
        layer_spectra(_Gate(lambda x: F.relu6(x) * x), [(part, None) for part in images.split(size)])[0].statistics
        for size in (2, 1))
    assert (whole.clipped_low, whole.clipped_high) == (parts.clipped_low, parts.clipped_high)
    assert whole.clipped_high == pytest.approx(3 / 8 / 2, abs=.01)


def test_gates_by_pattern():
    model = _tiny_gmnet()
    layers = layer_spectra(model, _batches(1), gates=['stages.2.*'])
    assert [layer.name for layer in layers] == ['stages.2.1', 'stages.2.2']
    with pytest.raises(UserError, match=r'no gate stages.9.* There are stages.0.1'):
        layer_spectra(model, _batches(1), gates=['stages.9.*'])


def test_some_channels():
    model, batches = _tiny_gmnet(), _batches(2)
    layer, module = layer_spectra(model, batches, ['stages.1.0'], gates=['stages.0.1'], channels=3)
    with torch.no_grad():
        block = model.stages[0][1]
        h = block.f1(block.dwconv(model.stages[0][0](model.stem(batches[0][0]))))[:, [0, 8, 16]]
    _assert_power(layer.signals['product'], h.clamp(0, 6) * h)
    assert layer.statistics.pre_gate_std == pytest.approx(h.std().item(), rel=1e-3)
    assert (module.after.channels, module.after.all_channels) == (3, 16)
    assert layer_spectra(model, batches, ['stages.1.0'], channels=16)[0].after.high_error == 0
    with pytest.raises(UserError, match='channels'):
        layer_spectra(model, batches, channels=0)


@pytest.mark.parametrize('kinds, images_per_part', [(['gate'], 1), (['gate', 'attention', 'activation'], 2)])
def test_parts_of_a_batch_give_what_the_whole_gives(monkeypatch, kinds, images_per_part):
    from gmnet_timm.frequency import tallies

    torch.manual_seed(0)
    model = _tiny_gmnet() if kinds == ['gate'] else timm.create_model('mobilenetv3_small_050').eval()
    batches = _batches(5)
    whole = layer_spectra(model, batches, kinds=kinds, alias_images=3)
    counts = []
    add = tallies.GateTally._add
    monkeypatch.setattr(tallies.GateTally, '_add', lambda self, *args: (counts.append(1), add(self, *args)))
    monkeypatch.setattr(tallies, '_CACHED', images_per_part)  # less than one image
    parts = layer_spectra(model, batches, kinds=kinds, alias_images=3)
    assert len(counts) > 3 * len(whole)
    for one, other in zip(whole, parts, strict=True):
        for key, signal in one.signals.items():
            torch.testing.assert_close(other.signals[key].power, signal.power, rtol=1e-5, atol=1e-12)
            assert other.signals[key].high_error == pytest.approx(signal.high_error, rel=1e-4, nan_ok=True)
        for key in ('pre_gate_std', 'clipped_low', 'clipped_high', 'gain', 'aliased'):
            if one.statistics is not None:
                assert getattr(other.statistics, key) == pytest.approx(
                    getattr(one.statistics, key), rel=1e-4, abs=1e-9, nan_ok=True), key


def test_the_error_of_looking_at_some_channels():
    """Maps of 400 channels with different spectra: the stated error is that of many choices of channels."""
    torch.manual_seed(0)
    smooth = torch.rand(400, 1, 1).expand(400, 5, 5) ** 2  # by how much a channel is blurred
    strength = torch.rand(400, 1, 1) + .2
    images = torch.randn(20, 400, 16, 16) * strength
    images = images + F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode='circular'), 5, 1) * 5 * smooth[:, :1, :1]
    model = nn.Sequential(nn.Conv2d(400, 400, 1, groups=400, bias=False))
    nn.init.ones_(model[0].weight)
    exact = layer_spectra(model, [(images, None)], ['0'], channels=None)[0].after
    ratios, errors = [], []
    for _ in range(25):
        shuffled = images[:, torch.randperm(400)]
        some = layer_spectra(model, [(shuffled, None)], ['0'], channels=16)[0].after
        ratios.append(some.high)
        errors.append(some.high_error)
    assert exact.high_error == 0
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=.35)
    assert abs(np.mean(ratios) - exact.high) < 3 * np.mean(errors) / 5
    assert np.mean(errors) > .02 * exact.high


# --- layouts ---------------------------------------------------------------------------------------------------------


class Same(nn.Module):
    """One network, written for maps with channels first, with channels last, and for tokens."""

    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.cls = nn.Parameter(torch.randn(1, 2, 8))
        self.layout, self.act, self.last = layout, nn.GELU(), nn.Identity()

    def forward(self, x):
        x = self.conv(x).permute(0, 2, 3, 1)
        if self.layout in ('NLC', 'prefix'):
            x = x.flatten(1, 2)
        if self.layout == 'prefix':
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = self.mix(self.norm(x))
        if self.layout == 'NCHW':
            x = x.permute(0, 3, 1, 2)
        return self.last(self.act(x) * x)


@pytest.mark.parametrize('layout', ['NHWC', 'NLC', 'prefix'])
def test_the_same_network_in_three_layouts_gives_the_same_numbers(layout):
    batches = [(torch.randn(3, 3, 32, 24), None)]
    expected = layer_spectra(Same('NCHW'), batches, ['last', 'act'], gates=['*'])
    got = layer_spectra(Same(layout), batches, ['last', 'act'], gates=['*'])
    assert [layer.name for layer in got] == [layer.name for layer in expected] == ['', 'act', 'last']
    for a, b in zip(got, expected):
        for side in b.signals:
            assert a.signals[side].size == (8, 6) and a.signals[side].layout == layout.replace('prefix', 'NLC')
            torch.testing.assert_close(a.signals[side].power, b.signals[side].power, rtol=1e-4, atol=1e-9)


def test_a_stated_layout_is_taken():
    batches = [(torch.randn(2, 3, 32, 24), None)]
    layer, = layer_spectra(Same('NHWC'), batches, ['last'], layout='NCHW')
    assert layer.signals['output'].size == (6, 8)  # wrong, as stated
    layer, = layer_spectra(Same('NLC'), batches, ['last'], layout='NLC')
    assert layer.signals['output'].size == (8, 6)


@pytest.mark.slow
@pytest.mark.parametrize('name, module, size', [
    ('swin_tiny_patch4_window7_224', 'layers.0.blocks.0', (56, 56)),
    ('convnext_tiny', 'stages.0.blocks.0.mlp.act', (56, 56)),
    ('vit_tiny_patch16_224', 'blocks.0', (14, 14)),
])
def test_spectra_of_transformers_and_channels_last(name, module, size):
    model, batches = timm.create_model(name).eval(), _batches(1, side=224)
    layer, = layer_spectra(model, batches, [module], channels=None)
    captured = []
    model.get_submodule(module).register_forward_hook(lambda _, args, out: captured.append(out))
    with torch.no_grad():
        model(batches[0][0])
    x, = captured
    maps = x.permute(0, 3, 1, 2) if x.dim() == 4 else x[:, 1:].mT.unflatten(-1, size)
    _assert_power(layer.signals['output'], maps)


# --- modules ---------------------------------------------------------------------------------------------------------


def test_gain_and_ratio_of_a_known_filter():
    """A box filter over three columns has the gain |1 + 2 cos w|^2 / 9 at frequencies along the rows."""
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 3), padding=(0, 1), padding_mode='circular', bias=False))
    nn.init.constant_(model[0].weight, 1 / 3)
    columns = torch.arange(32.)
    generator = torch.Generator().manual_seed(0)
    waves = [torch.cos(2 * math.pi * u * columns / 32) for u in range(17)]
    images = torch.stack([
        sum(torch.rand((), generator=generator) * wave for wave in waves).expand(32, 32) for _ in range(5)])[:, None]
    layer, = layer_spectra(model, [(images, None)], ['0'])
    gain, low, high = layer.gain()
    expected = (1 + 2 * torch.cos(2 * math.pi * torch.arange(17.) / 32)).square() / 9
    torch.testing.assert_close(gain[:17].float(), expected, rtol=1e-3, atol=1e-6)
    assert ((high - low)[:17] <= 1e-3 * gain[:17] + 1e-6).all()  # all images have the same gain
    after = layer.after.power.mean(0)  # of waves along the rows only: a bin is a frequency
    shares = after[9:].sum() / after[1:].sum(), sum((v ** 2 + u ** 2) ** .5 > .25 for v, u in _frequencies(32, 32))
    assert layer.after.high == pytest.approx((shares[0] / (shares[1] / (32 * 32 - 1))).item())
    assert layer.after.high < layer.before.high


def _frequencies(height, width):
    return [(v, u) for v in np.fft.fftfreq(height) for u in np.fft.fftfreq(width)]


def test_interval_is_of_the_mean_logarithm():
    from scipy.stats import norm
    before, after = torch.rand(6, 4, dtype=torch.float64) + .1, torch.rand(6, 4, dtype=torch.float64) + .1
    flat = torch.ones(4, 3)
    signals = dict(input=Signal('NCHW', (4, 4), before, flat), output=Signal('NCHW', (4, 4), after, flat))
    _, low, high = LayerSpectrum('x', 'module', signals).gain()
    logs = np.log((after / before).numpy())
    expected = norm.interval(.95, logs.mean(0), logs.std(0, ddof=1) / math.sqrt(6))
    np.testing.assert_allclose(low.log(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(high.log(), expected[1], rtol=1e-5)


def test_power_per_mode_of_white_noise_is_flat():
    maps = torch.randn(2000, 32, 24, dtype=torch.float64)
    signal = Signal('NCHW', (32, 24), radial_power_spectrum(maps), power_spectrum(maps).mean(0))
    assert (signal.per_mode[1:] * 32 * 24 - 1).abs().max() < .15
    assert signal.power.mean(0)[19] < .5 * signal.power.mean(0)[11]  # sums fall towards the corner


def test_layers_that_change_resolution_have_both_spectra():
    layer, = layer_spectra(_tiny_gmnet(), _batches(2), ['stages.1.0'])
    assert layer.signals['input'].size == (16, 16) and layer.signals['output'].size == (8, 8)
    assert layer.gain() is None
    assert {row['gain'] for row in layer.as_rows()} == {''}


def test_the_output_alone():
    class Embed(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    model = nn.Sequential(Embed(), nn.Unflatten(1, (3, 64, 64)))
    layer, = layer_spectra(model, _batches(2), ['1'])
    assert list(layer.signals) == ['output']


def test_input_of_a_module_that_works_in_place_is_seen_before():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    layer, = layer_spectra(model, _batches(2), ['1'])
    assert (layer.before.power[:, 1:] > layer.after.power[:, 1:]).any()


def test_a_module_that_is_called_twice_is_two_entries():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.act(x) - 1)

    model, batches = Twice(), _batches(3, 2)
    layers = layer_spectra(model, batches, ['act'])
    assert [layer.name for layer in layers] == ['act', 'act#2']
    assert all(len(layer.after.power) == 5 for layer in layers)
    _assert_power(layers[1].signals['output'], model(torch.cat([images for images, _ in batches])))


def test_what_a_block_returns_is_what_the_next_one_takes():
    """Measured once, unless it was changed in between."""
    class Changed(nn.Module):
        def forward(self, x):
            return x.add_(1)

    def model(last):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), last, nn.Conv2d(4, 4, 1))

    for last in (nn.Identity(), Changed()):
        batches = _batches(2, 1)
        together = layer_spectra(model(last), batches, ['0', '1', '2'])
        alone = [layer_spectra(model(last), batches, [name])[0] for name in ('0', '1', '2')]
        for a, b in zip(together, alone, strict=True):
            assert all(torch.equal(a.signals[side].power, b.signals[side].power) for side in ('input', 'output'))


def test_a_module_that_is_never_called_is_refused():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.used(x)

    for names in (['idle'], ['used', 'idle']):
        with pytest.raises(UserError, match='idle is not called'):
            layer_spectra(Idle(), _batches(1), names)


def test_patterns():
    layers = layer_spectra(_tiny_gmnet(), _batches(1), ['stages.*.1', 'stem'])
    assert [layer.name for layer in layers] == ['stem', 'stages.0.1', 'stages.1.1', 'stages.2.1', 'stages.3.1']


def test_blocks_of_a_model_without_gates():
    layers = layer_spectra(timm.create_model('resnet18').eval(), _batches(1))
    assert [layer.name for layer in layers] == [f'layer{i}.{j}' for i in (1, 2, 3, 4) for j in (0, 1)]
    assert {layer.kind for layer in layers} == {'module'}


@pytest.mark.parametrize('name, blocks', [
    ('gmnet_s1', ['stages.0.0', 'stages.0.1', 'stages.0.2', 'stages.1.0', 'stages.1.1']),
    ('starnet_s1', ['stages.0.0', 'stages.0.1', 'stages.0.2', 'stages.1.0', 'stages.1.1']),
    ('efficientnet_b0', ['blocks.0.0', 'blocks.1.0', 'blocks.1.1', 'blocks.2.0', 'blocks.2.1']),
])
def test_parts_of_blocks_are_not_blocks(name, blocks):
    """f1, dwconv2 and bn1 end with a digit too, and have parts."""
    from gmnet_timm.frequency.spectra import find_blocks
    from gmnet_timm.frequency.tracing import trace
    model = timm.create_model(name).eval()
    found, others = find_blocks(model, trace(model, torch.randn(2, 3, 64, 64)))
    assert found[:5] == blocks and not others


def test_what_can_be_looked_at():
    model, batches = _tiny_gmnet(), _batches(2)
    gates = ['stages.0.1', 'stages.1.1', 'stages.2.1', 'stages.2.2', 'stages.3.1']
    listed = list_layers(model, batches[0][0])
    assert [name for name, kind in listed if kind == 'gate'] == gates
    assert {kind for _, kind in listed} == {'gate', 'activation', 'module'}
    seen = {}
    layers = layer_spectra(
        model, batches, ['stages.1.0', 'stages.1.1'], gates=['stages.0.1'],
        on_maps=lambda name, side, maps: seen.update({(name, side): maps}))
    for layer in layers:
        for side, signal in layer.signals.items():
            assert seen[layer.name, side].shape[2:] == signal.size


def test_hooks_are_removed_whatever_happens():
    model = _tiny_gmnet()
    layer_spectra(model, _batches(1))
    assert _hooks(model) == 0
    with pytest.raises(UserError, match='head has no maps.*--layout'):
        layer_spectra(model, _batches(1), ['stages.0.1', 'head'])
    assert _hooks(model) == 0
    with pytest.raises(RuntimeError):
        layer_spectra(model, [(torch.zeros(1, 5, 64, 64), None)])
    assert _hooks(model) == 0
    with pytest.raises(UserError, match='no module nonsense'):
        layer_spectra(model, _batches(1), ['stages.0.1', 'nonsense'])
    assert _hooks(model) == 0
    with pytest.raises(UserError, match='no image'):
        layer_spectra(model, [])


def test_fused_model_has_the_same_spectra():
    from timm.utils import reparameterize_model
    model, batches = _tiny_gmnet(init_values=.5), _batches(2)
    expected = layer_spectra(model, batches)
    for got, layer in zip(layer_spectra(reparameterize_model(model), batches), expected, strict=True):
        torch.testing.assert_close(got.after.power, layer.after.power, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('create', [
    lambda: __import__('torchvision').models.resnet18(num_classes=3),
    lambda: __import__('torchvision').models.vit_b_16(num_classes=3, image_size=64),
], ids=['resnet', 'vit'])
@pytest.mark.slow
def test_models_of_torchvision(create):
    layers = layer_spectra(create().eval(), _batches(1))
    assert layers and all(layer.after.size[0] in (16, 8, 4, 2) for layer in layers)


def test_gates_without_maps():
    class Head(nn.Module):
        def forward(self, x):
            x = x.mean((2, 3))
            return x * x.sigmoid()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Head())
    with pytest.raises(UserError, match='gate 1 holds no maps'):
        layer_spectra(model, _batches(1), gates=['1'])


@pytest.mark.ecosystem
def test_models_of_transformers():
    transformers = pytest.importorskip('transformers')
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64)
    layers = layer_spectra(transformers.ViTForImageClassification(config).eval(), _batches(1))
    assert len(layers) == 2 and layers[0].after.size == (4, 4)


# --- the command line ------------------------------------------------------------------------------------------------


def test_cli_layers(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label in 'ab':
        (tmp_path / 'data' / label).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'data' / label / f'{i}.png')
    torch.save(_tiny_gmnet().state_dict(), tmp_path / 'model.pth')
    argv = ['freq', 'layers', str(tmp_path / 'model.pth'), '--data-dir', str(tmp_path / 'data'), '--num-images', '5',
            '--img-size', '64', '--workers', '0', '--output', str(tmp_path / 'out')]
    assert main(argv) == 0
    assert 'stages.2.2' in capsys.readouterr().out
    with (tmp_path / 'out' / 'layers.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['images'] for row in rows} == {'5'}
    first = [row for row in rows if row['layer'] == 'stages.0.1' and row['signal'] == 'product']
    assert [int(row['radius']) for row in first] == list(range(12))  # 16x16: the corner is at 11.3
    for row in first:
        assert float(row['gain_low']) <= float(row['gain']) <= float(row['gain_high'])
        assert float(row['predicted_power']) >= 0
    with (tmp_path / 'out' / 'layers-summary.csv').open(newline='') as file:
        summary = list(csv.DictReader(file))
    assert len(summary) == 5 and float(summary[0]['clipped_low']) > 0
    for name in ('layers.png', 'layers-gain.png'):
        assert Image.open(tmp_path / 'out' / name).size[0] > 500
    assert main([*argv, '--modules', 'stages.*.1', '--force', '--no-figure']) == 0
    assert main([*argv, '--no-figure']) == 1 and '--force' in capsys.readouterr().err
    capsys.readouterr()
    assert main([*argv, '--img-size', '32', '--force', '--no-figure']) == 0
    printed = capsys.readouterr().out
    assert 'product  2x2  high undefined' in printed and 'undefined: ' in printed
    assert 'nan' not in printed


def test_a_gate_without_energy_is_called_undefined():
    from gmnet_timm.cli.frequency_inside import _describe_layer

    class Gate(nn.Module):
        def forward(self, x):
            return (x * 0) * x

    layer, = layer_spectra(nn.Sequential(Gate()), _batches(3, side=16))
    line = _describe_layer(layer)
    assert 'product  16x16  high undefined' in line and 'aliased undefined' in line and 'nan' not in line
