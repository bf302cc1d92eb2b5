"""Predictions against Gaussian fields that are drawn, and against closed forms."""
import math

import pytest
import torch

from experiments.variants import Variant
from gmnet_timm.frequency import radial_power_spectrum
from gmnet_timm.frequency.gaussian import power_law, predict_independent, predict_pointwise
from gmnet_timm.frequency.split import bin_power, power_spectrum


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


RATIOS = {
    'identity': .239, 'relu': .324, 'gelu': .329, 'relu*x': .396, 'relu6*x': .396, 'gelu*x': .414, 'identity*x': .551}


@pytest.mark.parametrize('name', RATIOS)
def test_ratios_that_were_computed_elsewhere(name):
    """High/low of 64x64 maps with a 1/f amplitude spectrum and standard deviation 1.4, from an independent program."""
    predicted = bin_power(predict_pointwise(Variant(name), torch.zeros(1), power_law(64, 1) * 1.4 ** 2, 64), 64, 64)
    assert (predicted[17:].sum() / predicted[1:17].sum()).item() == pytest.approx(RATIOS[name], abs=.002)


@pytest.mark.slow
@pytest.mark.parametrize('exponent, scale, mean', [(1., 1.4, 0.), (.5, 3., -.7), (1.5, 8., 2.)])
def test_bound_of_two_per_cent_by_brute_force(exponent, scale, mean):
    """Every radial bin of f(x), aliasing included, for maps that are drawn: scales, spectra and means as they occur.

    Small and many maps, as the last bin holds one frequency.
    """
    size, count = 16, 60_000
    white = torch.randn(count, size, size, generator=torch.Generator().manual_seed(0))
    power = power_law(size, exponent)[0] * scale ** 2
    fields = torch.fft.irfft2(torch.fft.rfft2(white) * power.float().sqrt() * size, s=(size, size)) + mean
    measured_power = power_spectrum(fields).double().mean(0, keepdim=True)  # what the command takes
    for name in ('gelu', 'relu*x', 'relu6*x', 'gelu*x', 'hard_swish*x'):
        predicted = bin_power(
            predict_pointwise(Variant(name), fields.double().mean()[None], measured_power, size), size, size)
        measured = radial_power_spectrum(Variant(name)(fields)).double().mean(0)
        assert ((predicted - measured) / measured).abs().max() < .02, name


def test_the_bound_can_be_missed():
    """A map that is not Gaussian, the square of the fields without its mean: theory does not hold there."""
    fields, _ = _fields(500, 32, 1.)
    fields = fields.square() - fields.square().mean()
    predicted = bin_power(
        predict_pointwise(Variant('relu*x'), fields.mean()[None], power_spectrum(fields).mean(0), 32), 32, 32)
    measured = radial_power_spectrum(Variant('relu*x')(fields)).mean((0, 1))
    assert ((predicted - measured) / measured).abs().max() > .1


def test_square_is_in_closed_form():
    """The autocorrelation of x^2 is v^2 + 2 R^2 with x's autocorrelation R and its variance v."""
    _, power = _fields(1, 32, .7)
    r = torch.fft.irfft2(power.to(torch.complex128), s=(32, 32), norm='forward')
    expected = torch.fft.rfft2(r[0, 0, 0] ** 2 + 2 * r ** 2, norm='forward').real
    predicted = predict_pointwise(torch.square, torch.zeros(1), power, 32)
    torch.testing.assert_close(predicted, expected[0], rtol=1e-5, atol=1e-9)


def test_mean_matters():
    """x^2 of 3 + x is 9 + 6 x + x^2: mostly the spectrum of x, 36 times its power."""
    _, power = _fields(1, 32, .1)
    shifted = power.clone()
    shifted[0, 0, 0] += 9
    predicted = bin_power(predict_pointwise(torch.square, torch.full((1,), 3.), shifted, 32), 32, 32)
    torch.testing.assert_close(predicted[1:], 36 * bin_power(power[0], 32, 32)[1:], rtol=.01, atol=1e-9)
    assert predicted[0].item() == pytest.approx(9.01 ** 2, rel=1e-3)


def test_independent_operands():
    a, power_a = _fields(1500, 32, 1., seed=1)
    b, power_b = _fields(1500, 32, 2., seed=2)
    predicted = bin_power(predict_independent(power_a, power_b, 32), 32, 32)
    measured = radial_power_spectrum(a * b).mean((0, 1))
    assert ((predicted - measured) / measured)[1:17].abs().max() < .1
    assert predicted.sum().item() == pytest.approx(4, rel=1e-6)


def test_power_of_fields_is_what_it_should_be():
    fields, power = _fields(800, 32, 1.4)
    torch.testing.assert_close(power_spectrum(fields).mean(0).sum(), power.sum(), rtol=.05, atol=0)
    assert fields.std().item() == pytest.approx(1.4, rel=.03) and math.isfinite(power.sum())
