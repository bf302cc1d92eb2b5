"""Predictions against Gaussian fields that are drawn, and against closed forms."""
import math

import pytest
import torch
import torch.nn.functional as F

from gmnet_timm.frequency import radial_power_spectrum
from gmnet_timm.frequency.gaussian import predict_independent, predict_pointwise
from gmnet_timm.frequency.split import power_spectrum


def _fields(count, size, scale, seed=0):
    """Stationary Gaussian fields of standard deviation `scale` with a 1/f amplitude spectrum, and that spectrum."""
    v, u = torch.fft.fftfreq(size, d=1 / size), torch.fft.rfftfreq(size, d=1 / size)
    amplitude = 1 / (v[:, None] ** 2 + u ** 2).sqrt().clamp(min=1).double()
    amplitude[0, 0] = 0
    white = torch.randn(count, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    fields = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(size, size))
    power = amplitude.square()
    unit = torch.fft.irfft2(power.to(torch.complex128), s=(size, size), norm='forward')[0, 0].sqrt()
    white_std = torch.fft.irfft2(amplitude.square().to(torch.complex128), s=(size, size))[0, 0].sqrt()
    return fields * scale / white_std, (power / unit ** 2 * scale ** 2)[None]


FUNCTIONS = {
    'identity': (lambda x: x, .239),
    'relu': (F.relu, .324),
    'gelu': (F.gelu, .329),
    'relu gate': (lambda x: F.relu(x) * x, .396),
    'relu6 gate': (lambda x: F.relu6(x) * x, .396),
    'gelu gate': (lambda x: F.gelu(x) * x, .414),
    'square': (lambda x: x * x, .551),
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_gaussian_fields(name):
    function, ratio = FUNCTIONS[name]
    fields, power = _fields(1500, 64, 1.4)
    predicted = predict_pointwise(function, torch.zeros(1), power, 64)
    measured = radial_power_spectrum(function(fields)).mean((0, 1))
    nyquist = slice(1, 33)
    assert ((predicted - measured) / measured)[nyquist].abs().max() < .08  # 1500 fields have few modes per bin at r = 1
    assert (predicted[17:].sum() / predicted[1:17].sum()).item() == pytest.approx(ratio, abs=.006)
    assert predicted.sum().item() == pytest.approx(function(1.4 * torch.randn(10 ** 6)).square().mean().item(), rel=.02)


def test_square_is_in_closed_form():
    """The autocorrelation of x^2 is v^2 + 2 R^2 with x's autocorrelation R and its variance v."""
    _, power = _fields(1, 32, .7)
    r = torch.fft.irfft2(power.to(torch.complex128), s=(32, 32), norm='forward')
    expected = torch.fft.rfft2(r[0, 0, 0] ** 2 + 2 * r ** 2, norm='forward').real
    predicted = predict_pointwise(torch.square, torch.zeros(1), power, 32)
    from gmnet_timm.frequency.split import bin_power
    torch.testing.assert_close(predicted, bin_power(expected[0], 32, 32), rtol=1e-5, atol=1e-9)


def test_mean_matters():
    """x^2 of 3 + x is 9 + 6 x + x^2: mostly the spectrum of x, 36 times its power."""
    _, power = _fields(1, 32, .1)
    shifted = power.clone()
    shifted[0, 0, 0] += 9
    predicted = predict_pointwise(torch.square, torch.full((1,), 3.), shifted, 32)
    from gmnet_timm.frequency.split import bin_power
    torch.testing.assert_close(predicted[1:], 36 * bin_power(power[0], 32, 32)[1:], rtol=.01, atol=1e-9)
    assert predicted[0].item() == pytest.approx(9.01 ** 2, rel=1e-3)


def test_independent_operands():
    a, power_a = _fields(1500, 32, 1., seed=1)
    b, power_b = _fields(1500, 32, 2., seed=2)
    predicted = predict_independent(power_a, power_b, 32)
    measured = radial_power_spectrum(a * b).mean((0, 1))
    assert ((predicted - measured) / measured)[1:17].abs().max() < .1
    assert predicted.sum().item() == pytest.approx(4, rel=1e-6)


def test_power_of_fields_is_what_it_should_be():
    fields, power = _fields(800, 32, 1.4)
    torch.testing.assert_close(power_spectrum(fields).mean(0).sum(), power.sum(), rtol=.05, atol=0)
    assert fields.std().item() == pytest.approx(1.4, rel=.03) and math.isfinite(power.sum())
