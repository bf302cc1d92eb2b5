import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from experiments.command import run_command
from experiments.theory import predictions as theory
from experiments.theory.__main__ import parser
from gmnet_timm.errors import UserError
from gmnet_timm.frequency import radial_power_spectrum


@pytest.mark.parametrize('activation', theory.ACTIVATIONS)
@pytest.mark.parametrize('amplitude', [.5, 3., 6., 7., 20.])
def test_measured_harmonics_equal_the_closed_form(activation, amplitude):
    measured = theory.measured_harmonics(activation, amplitude, 40)
    expected = theory.closed_form_harmonics(activation, amplitude, 40)
    # folding of what lies beyond the samples is below 1e-9 for n^-2
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-9 * amplitude ** 2)


@pytest.mark.parametrize('activation', theory.ACTIVATIONS)
def test_closed_form_equals_quadrature(activation):
    """Against an adaptive integral of the definition of each activation, written without torch."""
    from scipy.integrate import quad
    amplitude = 9.
    functions = {
        'identity': lambda x: x,
        'relu': lambda x: max(x, 0.),
        'relu6': lambda x: min(max(x, 0.), 6.),
        'gelu': lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    }
    act = functions[activation]

    def product(s):
        x = amplitude * math.cos(s)
        return act(x) * x

    kinks = [math.acos(6 / amplitude), math.pi / 2]
    for n, amplitude_n in enumerate(theory.closed_form_harmonics(activation, amplitude, 12)):
        integral, _ = quad(
            lambda s, n=n: product(s) * math.cos(n * s), 0, math.pi, points=kinks, limit=400, epsabs=1e-10)
        assert amplitude_n == pytest.approx(abs(integral) * (1 if n == 0 else 2) / math.pi, abs=1e-9)


def test_relu_has_the_coefficients_of_the_half_parabola():
    amplitude = 5.
    expected = [amplitude ** 2 / 4, 4 * amplitude ** 2 / (3 * math.pi), amplitude ** 2 / 4] + [
        4 * amplitude ** 2 / (math.pi * n * (n * n - 4)) if n % 2 else 0. for n in range(3, 20)]
    np.testing.assert_allclose(theory.closed_form_harmonics('relu', amplitude, 20), expected, atol=1e-13)
    np.testing.assert_allclose(theory.closed_form_harmonics('relu6', amplitude, 20), expected, atol=1e-13)


def test_decay_rates():
    assert theory.decay_rate('identity', 12) == math.inf
    assert theory.decay_rate('relu', 12) == pytest.approx(3, abs=.02)
    assert theory.decay_rate('relu6', 5) == pytest.approx(3, abs=.02)
    assert theory.decay_rate('relu6', 12) == pytest.approx(2, abs=.02)
    assert theory.decay_rate('gelu', 12) == math.inf
    assert theory.decay_rate('relu', 12, gate=False) == pytest.approx(2, abs=.02)
    assert theory.decay_rate('relu6', 12, gate=False) == pytest.approx(2, abs=.02)


def test_gelu_falls_faster_than_any_power():
    rates = [theory.decay_rate('gelu', 12, first=n, last=2 * n) for n in (8, 16, 32)]
    assert rates == sorted(rates) and rates[-1] > 10


def test_a_product_doubles_the_support():
    rows, cols = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing='ij')
    generator = torch.Generator().manual_seed(0)
    signal = torch.zeros(64, 64, dtype=torch.float64)
    for u in range(1, 8):
        phase = 2 * math.pi * torch.rand((), generator=generator).item()
        signal += torch.cos(2 * math.pi * u * cols.double() / 64 + phase)
    spectrum = radial_power_spectrum(signal)
    squared = radial_power_spectrum(signal * signal)
    assert spectrum[8:].max() < 1e-25 < spectrum[7]
    assert squared[15:].max() < 1e-25 < squared[14]


def test_comparison_reports_its_error():
    for harmonics in theory.compare_harmonics(amplitude=8., count=6):
        assert len(harmonics.measured) == len(harmonics.closed_form) == 6
        assert 0 <= harmonics.error < 1e-8


@pytest.mark.parametrize('amplitude, activation, gate, third, fifth', [
    (1.4, 'relu', False, .78, .18), (1.4, 'relu6', True, 2.95, .07), (1.4, 'gelu', True, 5.23, .03),
    (12., 'relu', False, .78, .18), (12., 'relu6', True, 1.57, .46), (12., 'gelu', True, 2.96, .07)])
def test_share_of_high_harmonics(amplitude, activation, gate, third, fifth):
    """Per cent of the energy in harmonics from the third and from the fifth on, from an independent program."""
    found = theory.measured_harmonics(activation, amplitude, 4000, gate=gate)
    shares = [100 * theory.energy_share(found, first) for first in (3, 5)]
    assert shares == pytest.approx([third, fifth], abs=.006)


# --- Gaussian maps ---------------------------------------------------------------------------------------------------


def _high_low(name, scale):
    return theory.high_low(theory.predict_maps([name], [scale])[0].output)


def test_limits_of_gates_at_small_and_large_scales():
    """GELU(x)x is x^2 / 2 for small x, ReLU(x)x for large; ReLU6(x)x is ReLU(x)x for small x, 6 ReLU(x) for large."""
    assert _high_low('gelu*x', .01) == pytest.approx(_high_low('identity*x', 1.), rel=.02)
    assert _high_low('gelu*x', 200) == pytest.approx(_high_low('relu*x', 1.), rel=.005)
    assert _high_low('relu6*x', .5) == pytest.approx(_high_low('relu*x', 1.), rel=1e-4)
    assert _high_low('relu6*x', 800) == pytest.approx(_high_low('relu', 1.), rel=.02)
    assert _high_low('relu*x', 1.) == pytest.approx(_high_low('relu*x', 7.), rel=1e-6)


def test_share_beyond_6_is_counted():
    prediction, = theory.predict_maps(['relu'], [3.])
    assert prediction.beyond_6 == pytest.approx((3 * torch.randn(10 ** 6) > 6).double().mean().item(), rel=.03)


def test_scale_where_two_functions_part():
    scale = theory.scale_where('relu6*x', 'relu*x', .99)
    assert _high_low('relu6*x', scale) == pytest.approx(.99 * _high_low('relu*x', scale), rel=1e-4)
    assert _high_low('relu6*x', .9 * scale) > .99 * _high_low('relu*x', .9 * scale)
    assert theory.scale_where('relu6*x', 'gelu*x', 1.05) == math.inf


def test_theory_of_a_model_whose_gates_work_on_gaussian_maps(tmp_path, capsys):
    """A network that is one gate on white noise: what is measured is what is predicted for its own function."""
    from gmnet_timm.frequency import layer_spectra
    from gmnet_timm.gated import Gate
    generator = torch.Generator().manual_seed(0)
    batches = [(2 * torch.randn(64, 3, 32, 32, generator=generator), torch.zeros(64))]
    layers = layer_spectra(torch.nn.Sequential(Gate('gelu')), batches)
    row, = theory.gate_rows(layers, ['gelu*x', 'relu', 'identity*x'])
    assert row['product_high_low'] == pytest.approx(row['predicted_gelu*x'], rel=.02)
    assert row['predicted_high_low'] == row['predicted_gelu*x']
    assert row['gain_low'] < row['gain'] < row['gain_high'] and row['pre_gate_std'] == pytest.approx(2, rel=.01)
    assert row['gain'] == pytest.approx(row['product_high_low'] / row['value_high_low'], rel=.02)


def test_command_for_tones(tmp_path, capsys):
    argv = ['--harmonics', '5', '--scales', '1', '--output', str(tmp_path)]
    assert run_command(parser(), [*argv, '--amplitude', '9']) == 0
    printed = capsys.readouterr().out
    assert 'relu6 n^-1.99' in printed or 'relu6 n^-2.0' in printed
    assert '40.500000 (40.500000)' in printed  # A^2 / 2
    assert (tmp_path / 'theory.png').stat().st_size > 10000
    assert run_command(parser(), [*argv, '--amplitude', '-1']) == 1


def test_command_for_maps(tmp_path, capsys):
    assert run_command(parser(), ['--output', str(tmp_path), '--scales', '1.4', '--no-figure']) == 0
    assert '0.239' in capsys.readouterr().out
    assert 'relu6*x,1.4,' in (tmp_path / 'theory.csv').read_text()
    assert run_command(parser(), ['--output', str(tmp_path), '--scales', '1.4', '--no-figure']) == 1
    assert 'exists' in capsys.readouterr().err
    assert run_command(parser(), ['--output', str(tmp_path / 'a'), '--functions', 'gelu*v', '--no-figure']) == 1
    assert 'second map' in capsys.readouterr().err


@pytest.mark.slow
def test_command_for_a_model(tmp_path, capsys):
    (tmp_path / 'data' / 'a').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / 'data' / 'a' / f'{i}.png')
    torch.save(timm.create_model('gmnet_s1', num_classes=1).state_dict(), tmp_path / 'gmnet_s1.pth')
    argv = [f'gmnet_s1={tmp_path}/gmnet_s1.pth', '--data-dir', str(tmp_path / 'data'), '--img-size',
            '64', '--output', str(tmp_path), '--workers', '0']
    assert run_command(parser(), argv) == 0
    assert 'of 14 gates' in capsys.readouterr().out and (tmp_path / 'theory-gates.png').stat().st_size > 10000
    assert (tmp_path / 'theory-gates.csv').read_text().count('\n') == 15


def test_a_model_without_gates_is_an_error(tmp_path):
    from gmnet_timm.frequency import layer_spectra
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)))
    layers = layer_spectra(model, [(torch.randn(2, 3, 32, 32), torch.zeros(2))], modules=['0'])
    with pytest.raises(UserError, match='no gate'):
        theory.gate_rows(layers)


def test_unknown_activation():
    with pytest.raises(ValueError, match='identity'):
        theory.closed_form_harmonics('tanh', 1., 3)
