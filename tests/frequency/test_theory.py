import math

import numpy as np
import pytest
import torch

from gmnet_timm.frequency import radial_power_spectrum, theory


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


def test_unknown_activation():
    with pytest.raises(ValueError, match='identity'):
        theory.closed_form_harmonics('tanh', 1., 3)
