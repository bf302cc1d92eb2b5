import csv
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from spectra_helpers import assert_power, count_hooks, make_batches, tiny_gmnet
from torch import nn

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.frequency import LayerSpectrum, Signal, layer_spectra, list_layers, radial_power_spectrum
from gmnet_timm.frequency.split import power_spectrum

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
    model, batches = timm.create_model(name).eval(), make_batches(1, side=224)
    layer, = layer_spectra(model, batches, [module], channels=None)
    captured = []
    model.get_submodule(module).register_forward_hook(lambda _, args, out: captured.append(out))
    with torch.no_grad():
        model(batches[0][0])
    x, = captured
    maps = x.permute(0, 3, 1, 2) if x.dim() == 4 else x[:, 1:].mT.unflatten(-1, size)
    assert_power(layer.signals['output'], maps)


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
    layer, = layer_spectra(tiny_gmnet(), make_batches(2), ['stages.1.0'])
    assert layer.signals['input'].size == (16, 16) and layer.signals['output'].size == (8, 8)
    assert layer.gain() is None
    assert {row['gain'] for row in layer.as_rows()} == {''}


def test_the_output_alone():
    class Embed(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    model = nn.Sequential(Embed(), nn.Unflatten(1, (3, 64, 64)))
    layer, = layer_spectra(model, make_batches(2), ['1'])
    assert list(layer.signals) == ['output']


def test_input_of_a_module_that_works_in_place_is_seen_before():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    layer, = layer_spectra(model, make_batches(2), ['1'])
    assert (layer.before.power[:, 1:] > layer.after.power[:, 1:]).any()


def test_a_module_that_is_called_twice_is_two_entries():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.act(x) - 1)

    model, batches = Twice(), make_batches(3, 2)
    layers = layer_spectra(model, batches, ['act'])
    assert [layer.name for layer in layers] == ['act', 'act#2']
    assert all(len(layer.after.power) == 5 for layer in layers)
    assert_power(layers[1].signals['output'], model(torch.cat([images for images, _ in batches])))


def test_what_a_block_returns_is_what_the_next_one_takes():
    """Measured once, unless it was changed in between."""
    class Changed(nn.Module):
        def forward(self, x):
            return x.add_(1)

    def model(last):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), last, nn.Conv2d(4, 4, 1))

    for last in (nn.Identity(), Changed()):
        batches = make_batches(2, 1)
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
            layer_spectra(Idle(), make_batches(1), names)


def test_patterns():
    layers = layer_spectra(tiny_gmnet(), make_batches(1), ['stages.*.1', 'stem'])
    assert [layer.name for layer in layers] == ['stem', 'stages.0.1', 'stages.1.1', 'stages.2.1', 'stages.3.1']


def test_blocks_of_a_model_without_gates():
    layers = layer_spectra(timm.create_model('resnet18').eval(), make_batches(1))
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
    model, batches = tiny_gmnet(), make_batches(2)
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
    model = tiny_gmnet()
    layer_spectra(model, make_batches(1))
    assert count_hooks(model) == 0
    with pytest.raises(UserError, match='head has no maps.*--layout'):
        layer_spectra(model, make_batches(1), ['stages.0.1', 'head'])
    assert count_hooks(model) == 0
    with pytest.raises(RuntimeError):
        layer_spectra(model, [(torch.zeros(1, 5, 64, 64), None)])
    assert count_hooks(model) == 0
    with pytest.raises(UserError, match='no module nonsense'):
        layer_spectra(model, make_batches(1), ['stages.0.1', 'nonsense'])
    assert count_hooks(model) == 0
    with pytest.raises(UserError, match='no image'):
        layer_spectra(model, [])


def test_fused_model_has_the_same_spectra():
    from timm.utils import reparameterize_model
    model, batches = tiny_gmnet(init_values=.5), make_batches(2)
    expected = layer_spectra(model, batches)
    for got, layer in zip(layer_spectra(reparameterize_model(model), batches), expected, strict=True):
        torch.testing.assert_close(got.after.power, layer.after.power, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('create', [
    lambda: __import__('torchvision').models.resnet18(num_classes=3),
    lambda: __import__('torchvision').models.vit_b_16(num_classes=3, image_size=64),
], ids=['resnet', 'vit'])
@pytest.mark.slow
def test_models_of_torchvision(create):
    layers = layer_spectra(create().eval(), make_batches(1))
    assert layers and all(layer.after.size[0] in (16, 8, 4, 2) for layer in layers)


def test_gates_without_maps():
    class Head(nn.Module):
        def forward(self, x):
            x = x.mean((2, 3))
            return x * x.sigmoid()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Head())
    with pytest.raises(UserError, match='gate 1 holds no maps'):
        layer_spectra(model, make_batches(1), gates=['1'])


@pytest.mark.ecosystem
def test_models_of_transformers():
    transformers = pytest.importorskip('transformers')
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64)
    layers = layer_spectra(transformers.ViTForImageClassification(config).eval(), make_batches(1))
    assert len(layers) == 2 and layers[0].after.size == (4, 4)


# --- the command line ------------------------------------------------------------------------------------------------


def test_cli_layers(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label in 'ab':
        (tmp_path / 'data' / label).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'data' / label / f'{i}.png')
    torch.save(tiny_gmnet().state_dict(), tmp_path / 'model.pth')
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

    layer, = layer_spectra(nn.Sequential(Gate()), make_batches(3, side=16))
    line = _describe_layer(layer)
    assert 'product  16x16  high undefined' in line and 'aliased undefined' in line and 'nan' not in line
