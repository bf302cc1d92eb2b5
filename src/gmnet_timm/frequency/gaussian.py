"""What a nonlinearity does to the spectrum of a Gaussian field: exact, by its expansion in Hermite polynomials.

Let z be a stationary Gaussian field of unit variance with autocorrelation rho, and y = f(m + s z). With the normalised
Hermite polynomials h_k (orthonormal under the normal density) and a_k = E[f(m + s Z) h_k(Z)], the mean product of y at
two positions is R = sum over k of a_k^2 rho^k (Mehler's formula), and the power spectrum of y, aliasing included, is
the DFT of R on the grid.
"""
import math
from collections.abc import Callable

import torch

__all__ = ['power_law', 'predict_independent', 'predict_pointwise']

TERMS = 24


def predict_pointwise(
        function: Callable[[torch.Tensor], torch.Tensor],
        mean: torch.Tensor,
        power: torch.Tensor,
        width: int,
) -> torch.Tensor:
    """Power spectrum of f(x), for channels that are Gaussian fields.

    Args:
        function: f, applied to each value.
        mean: Mean of each channel, (C,).
        power: Power spectrum of each channel, (C, H, W // 2 + 1), as of `power_spectrum`; the squared mean at [0, 0].
        width: W.

    Returns:
        Power by frequency, as of `power_spectrum`, mean over channels, (H, W // 2 + 1), float64.
    """
    mean, power = mean.double().cpu(), power.double().cpu()
    covariance = _autocorrelation(power, width) - mean.square()[:, None, None]
    variance = covariance[:, 0, 0].clamp(min=0)
    rho = covariance / variance.clamp(min=1e-30)[:, None, None]
    coefficients, square = _hermite(function, mean, variance.sqrt())
    # what the expansion leaves out falls as rho^TERMS or faster; its size is known from the second moment
    rest = (square - coefficients.square().sum(0)).clamp(min=0)
    r = rest[:, None, None].expand_as(rho).clone()
    for coefficient in coefficients.flip(0):
        r.mul_(rho).add_(coefficient.square()[:, None, None])
    return _mean_power(r)


def predict_independent(gate: torch.Tensor, value: torch.Tensor, width: int) -> torch.Tensor:
    """Power spectrum of the product of two independent stationary fields, from their power spectra.

    Args:
        gate: Power spectrum of each channel, (C, H, W // 2 + 1).
        value: The same of the other operand.
        width: W.

    Returns:
        Power by frequency, as of `power_spectrum`, mean over channels, (H, W // 2 + 1), float64.
    """
    return _mean_power(_autocorrelation(gate.double().cpu(), width) * _autocorrelation(value.double().cpu(), width))


def power_law(size: int, exponent: float) -> torch.Tensor:
    """Power spectrum (1, size, size // 2 + 1) of maps of variance 1 and mean 0 with amplitudes 1 / radius^exponent."""
    v, u = torch.fft.fftfreq(size, 1 / size).double(), torch.fft.rfftfreq(size, 1 / size).double()
    power = (v[:, None] ** 2 + u ** 2).clamp(min=1) ** -exponent
    power[0, 0] = 0
    return power[None] / _autocorrelation(power[None], size)[:, :1, :1]


def _autocorrelation(power: torch.Tensor, width: int) -> torch.Tensor:
    return torch.fft.irfft2(power.to(torch.complex128), s=(power.shape[-2], width), norm='forward')


def _mean_power(autocorrelation: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft2(autocorrelation, norm='forward').real.clamp(min=0).mean(0)


def _hermite(
        function: Callable[[torch.Tensor], torch.Tensor],
        mean: torch.Tensor,
        std: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients (TERMS, C) of f(mean + std Z), and its second moment (C,), by the rectangle rule on a fine grid."""
    z = torch.linspace(-9, 9, 3601, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    y = function((mean[:, None] + std[:, None] * z).float()).double()
    polynomials = [torch.ones_like(z), z]
    for k in range(1, TERMS - 1):
        polynomials.append((z * polynomials[k] - math.sqrt(k) * polynomials[k - 1]) / math.sqrt(k + 1))
    return torch.stack(polynomials) @ (y * weight).mT, (y.square() * weight).sum(-1)
