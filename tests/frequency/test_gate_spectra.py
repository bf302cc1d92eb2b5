"""The operands and products of gates, and what is said of them."""
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from spectra_helpers import assert_power, make_batches, tiny_gmnet
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency import layer_spectra
from gmnet_timm.frequency.split import bin_power


@pytest.mark.parametrize('gate', ['identity', 'fc', 'dw', 'ln'])
def test_both_operands_and_the_product_of_gmnet(gate):
    model, batches = tiny_gmnet(gate=gate), make_batches(3, 2)
    layers = layer_spectra(model, batches, channels=None)
    assert [layer.name for layer in layers] == ['stages.0.1', 'stages.1.1', 'stages.2.1', 'stages.2.2', 'stages.3.1']
    with torch.no_grad():  # the first gate, computed from the network's definition
        x = torch.cat([images for images, _ in batches])
        block = model.stages[0][1]
        h = block.f1(block.dwconv(model.stages[0][0](model.stem(x))))
        value = block.gate(h)
    assert_power(layers[0].signals['gate'], h.clamp(0, 6))
    assert_power(layers[0].signals['value'], value)
    assert_power(layers[0].signals['product'], h.clamp(0, 6) * value)
    statistics = layers[0].statistics
    assert statistics.pre_gate_std == pytest.approx(h.std().item(), rel=1e-3)
    assert statistics.value_std == pytest.approx(value.std().item(), rel=1e-3)
    assert statistics.clipped_low == pytest.approx((h <= 0).float().mean().item(), rel=1e-6)
    assert statistics.theory == ('gaussian' if gate == 'identity' else 'independent')


def test_starnets_product_by_hand():
    torch.manual_seed(0)
    model, batches = timm.create_model('starnet_s1').eval(), make_batches(2)
    with torch.no_grad():
        block = model.stages[0][1]
        h = block.dwconv(model.stages[0][0](model.stem(batches[0][0])))
        gate, value = F.relu6(block.f1(h)), block.f2(h)
    layers = layer_spectra(model, batches, channels=None)
    assert len(layers) == 15
    for name, x in (('gate', gate), ('value', value), ('product', gate * value)):
        assert_power(layers[0].signals[name], x)
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
    assert_power(layer.signals['gate'], phi)
    assert_power(layer.signals['product'], images * phi)


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
        assert_power(layer.signals[name], x)
    assert layer.statistics.pre_gate_std == pytest.approx(images.std(correction=0).item(), rel=1e-4)


def test_clipped_shares_do_not_depend_on_the_batches():
    images = torch.cat([torch.linspace(-3, 2, 512), torch.linspace(1, 9, 512)]).view(2, 1, 16, 32)
    whole, parts = (
        layer_spectra(_Gate(lambda x: F.relu6(x) * x), [(part, None) for part in images.split(size)])[0].statistics
        for size in (2, 1))
    assert (whole.clipped_low, whole.clipped_high) == (parts.clipped_low, parts.clipped_high)
    assert whole.clipped_high == pytest.approx(3 / 8 / 2, abs=.01)


def test_gates_by_pattern():
    model = tiny_gmnet()
    layers = layer_spectra(model, make_batches(1), gates=['stages.2.*'])
    assert [layer.name for layer in layers] == ['stages.2.1', 'stages.2.2']
    with pytest.raises(UserError, match=r'no gate stages.9.* There are stages.0.1'):
        layer_spectra(model, make_batches(1), gates=['stages.9.*'])


def test_some_channels():
    model, batches = tiny_gmnet(), make_batches(2)
    layer, module = layer_spectra(model, batches, ['stages.1.0'], gates=['stages.0.1'], channels=3)
    with torch.no_grad():
        block = model.stages[0][1]
        h = block.f1(block.dwconv(model.stages[0][0](model.stem(batches[0][0]))))[:, [0, 8, 16]]
    assert_power(layer.signals['product'], h.clamp(0, 6) * h)
    assert layer.statistics.pre_gate_std == pytest.approx(h.std().item(), rel=1e-3)
    assert (module.after.channels, module.after.all_channels) == (3, 16)
    assert layer_spectra(model, batches, ['stages.1.0'], channels=16)[0].after.high_error == 0
    with pytest.raises(UserError, match='channels'):
        layer_spectra(model, batches, channels=0)


@pytest.mark.parametrize('kinds, images_per_part', [(['gate'], 1), (['gate', 'activation'], 2)])
def test_parts_of_a_batch_give_what_the_whole_gives(monkeypatch, kinds, images_per_part):
    from gmnet_timm.frequency import tallies

    torch.manual_seed(0)
    model = tiny_gmnet() if kinds == ['gate'] else timm.create_model('mobilenetv3_small_050').eval()
    batches = make_batches(5)
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
