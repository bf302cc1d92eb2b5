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
from gmnet_timm.frequency import radial_power_spectrum
from gmnet_timm.frequency.spectra import layer_spectra


def _tiny_gmnet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 2, 1), num_classes=3, **kwargs).eval()


def _batches(*sizes, side=64):
    return [(torch.randn(n, 3, side, side), torch.zeros(n, dtype=torch.long)) for n in sizes]


def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_spectra_are_those_of_the_gates_input_and_output():
    model = _tiny_gmnet()
    batches = _batches(3, 2)
    layers = layer_spectra(model, batches)
    assert [layer.name for layer in layers] == ['stages.0.1', 'stages.1.1', 'stages.2.1', 'stages.2.2', 'stages.3.1']
    with torch.no_grad():  # the first gate, computed from the network's definition
        x = torch.cat([images for images, _ in batches])
        block = model.stages[0][1]
        h = block.f1(block.dwconv(model.stages[0][0](model.stem(x))))
        gated = h.clamp(0, 6) * h
    torch.testing.assert_close(layers[0].before, radial_power_spectrum(h).mean(1).double(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(layers[0].after, radial_power_spectrum(gated).mean(1).double(), rtol=1e-4, atol=1e-9)
    assert layers[0].size == (16, 16)


def _assert_spectra(layer, before, after):
    torch.testing.assert_close(layer.before, radial_power_spectrum(before).mean(1).double(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(layer.after, radial_power_spectrum(after).mean(1).double(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize('gate', ['fc', 'dw', 'ln'])
def test_input_of_a_gate_is_what_both_factors_come_from(gate):
    model, batches = _tiny_gmnet(gate=gate), _batches(2)
    with torch.no_grad():
        block = model.stages[0][1]
        h = block.f1(block.dwconv(model.stages[0][0](model.stem(batches[0][0]))))
        gated = h.clamp(0, 6) * block.gate(h)
    _assert_spectra(layer_spectra(model, batches)[0], h, gated)


def test_spectra_of_other_gates():
    model, batches = timm.create_model('resnet18_gate_gelu').eval(), _batches(2)
    with torch.no_grad():
        h = model.layer1[0].bn1(model.layer1[0].conv1(model.maxpool(model.act1(model.bn1(model.conv1(batches[0][0]))))))
        layers = layer_spectra(model, batches)
    assert len(layers) == 8
    _assert_spectra(layers[0], h, F.gelu(h) * h)
    model = timm.create_model('starnet_s1').eval()
    with torch.no_grad():
        block = model.stages[0][1]
        h = block.dwconv(model.stages[0][0](model.stem(batches[0][0])))
        layers = layer_spectra(model, batches)
    assert len(layers) == 15
    _assert_spectra(layers[0], h, F.relu6(block.f1(h)) * block.f2(h))


def test_product_that_cannot_be_read():
    class Square(nn.Module):
        def forward(self, x):
            return x * x + 1

    with pytest.raises(UserError, match='no module takes or returns it'):
        layer_spectra(nn.Sequential(nn.Conv2d(3, 4, 1), Square()), _batches(1))


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
    before, after = layer.before.mean(0), layer.after.mean(0)
    assert layer.cutoff == 8
    assert layer.high_low_ratio(False) == pytest.approx((before[9:].sum() / before[1:9].sum()).item())
    assert layer.high_low_ratio(True) < layer.high_low_ratio(False)
    assert layer.high_low_ratio(True) == pytest.approx((after[9:].sum() / after[1:9].sum()).item())


def test_interval_is_of_the_mean_logarithm():
    from scipy.stats import norm

    from gmnet_timm.frequency.spectra import LayerSpectrum
    before, after = torch.rand(6, 4, dtype=torch.float64) + .1, torch.rand(6, 4, dtype=torch.float64) + .1
    _, low, high = LayerSpectrum('x', (4, 4), before, after).gain()
    logs = np.log((after / before).numpy())
    expected = norm.interval(.95, logs.mean(0), logs.std(0, ddof=1) / math.sqrt(6))
    np.testing.assert_allclose(low.log(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(high.log(), expected[1], rtol=1e-5)


def test_input_of_a_module_that_works_in_place_is_seen_before():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    layer, = layer_spectra(model, _batches(2), ['1'])
    assert (layer.before[:, 1:] > layer.after[:, 1:]).any()
    assert not torch.equal(layer.before, layer.after)


def test_hooks_are_removed_whatever_happens():
    model = _tiny_gmnet()
    layer_spectra(model, _batches(1))
    assert _hooks(model) == 0
    with pytest.raises(UserError, match='no feature maps'):
        layer_spectra(model, _batches(1), ['stages.0.1', 'head'])
    assert _hooks(model) == 0
    with pytest.raises(RuntimeError):
        layer_spectra(model, [(torch.zeros(1, 5, 64, 64), None)])
    assert _hooks(model) == 0
    with pytest.raises(UserError, match='no module nonsense'):
        layer_spectra(model, _batches(1), ['stages.0.1', 'nonsense'])
    assert _hooks(model) == 0


def test_number_of_images_and_errors():
    model = _tiny_gmnet()
    assert len(layer_spectra(model, _batches(2, 2, 2), max_images=3)[0].before) == 3
    with pytest.raises(UserError, match='no image'):
        layer_spectra(model, [])
    with pytest.raises(UserError, match='no gates'):
        layer_spectra(timm.create_model('test_resnet'), _batches(1))
    with pytest.raises(UserError, match='changes the size'):
        layer_spectra(model, _batches(1), ['stem.0'])


def test_fused_model_has_the_same_spectra():
    from timm.utils import reparameterize_model
    model, batches = _tiny_gmnet(init_values=.5), _batches(2)
    expected = layer_spectra(model, batches)
    for got, layer in zip(layer_spectra(reparameterize_model(model), batches), expected, strict=True):
        torch.testing.assert_close(got.after, layer.after, rtol=1e-3, atol=1e-6)


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
    first = [row for row in rows if row['layer'] == 'stages.0.1']
    assert [int(row['radius']) for row in first] == list(range(12))  # 16x16: the corner is at 11.3
    for row in first:
        assert float(row['gain_low']) <= float(row['gain']) <= float(row['gain_high'])
    for name in ('layers.png', 'layers-gain.png'):
        assert Image.open(tmp_path / 'out' / name).size[0] > 500
