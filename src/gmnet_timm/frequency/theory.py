"""What a gate does to a pure tone: harmonics of act(x) * x for x = A sin(t), measured and in closed form.

With s = t - pi / 2 the tone is A cos(s) and every such function is even in s, so that it is c_0 + sum of c_n cos(n s).
The amplitude of harmonic n is |c_n|, c_0 is the mean. The closed forms:

    identity  A^2 cos^2 s: mean and second harmonic A^2 / 2, nothing else. A product doubles the support of a spectrum.
    relu      A^2 cos^2 s where cos s > 0. The slope is continuous, the curvature jumps: amplitudes fall as n^-3.
    relu6     as relu up to A = 6. Beyond, 6 A cos s for |s| < acos(6 / A); the slope jumps from 12 to 6 where x passes
              6, so that amplitudes fall as n^-2.
    gelu      x^2 / 2 + (x^2 / 2) erf(x / sqrt 2). With q = A^2 / 4 and modified Bessel functions I_m,
              erf(A cos s / sqrt 2) = sum over odd n = 2m + 1 of E_n cos(n s),
              E_n = (-1)^m A sqrt(2 / pi) exp(-q) (I_m(q) + I_m+1(q)) / n (integrate its derivative, which is the
              generating function of I_m), and x^2 shifts harmonics by two. Amplitudes fall faster than any power.

Activations alone (`gate=False` in `measured_harmonics`) fall as n^-2 for relu and relu6, whose slope jumps at 0.
"""
import dataclasses
import math

import torch
from timm.layers import get_act_layer

from gmnet_timm.frequency.extras import require_scipy

__all__ = ['ACTIVATIONS', 'Harmonics', 'closed_form_harmonics', 'compare_harmonics', 'decay_rate', 'measured_harmonics']

ACTIVATIONS = ('identity', 'relu', 'gelu', 'relu6')


@dataclasses.dataclass(frozen=True)
class Harmonics:
    """Amplitudes of the harmonics 0, 1, 2, … of act(x) * x for x = A sin(t), and how fast they fall."""

    activation: str
    amplitude: float  # A
    measured: list[float]
    closed_form: list[float]
    gate_decay: float  # p of n^-p for act(x) * x
    activation_decay: float  # p of n^-p for act(x) alone

    @property
    def error(self) -> float:
        """Largest difference of measured and closed form, relative to the largest amplitude."""
        return max(abs(m - c) for m, c in zip(self.measured, self.closed_form, strict=True)) / max(self.closed_form)


def compare_harmonics(amplitude: float = 12., count: int = 9) -> list[Harmonics]:
    """Measure harmonics 0 to count - 1 of each activation's gate and set them against the closed form.

    Args:
        amplitude: Amplitude A of the tone. relu6 differs from relu beyond 6.
        count: Number of harmonics.
    """
    return [
        Harmonics(
            activation=name,
            amplitude=amplitude,
            measured=measured_harmonics(name, amplitude, count).tolist(),
            closed_form=closed_form_harmonics(name, amplitude, count).tolist(),
            gate_decay=decay_rate(name, amplitude),
            activation_decay=decay_rate(name, amplitude, gate=False),
        )
        for name in ACTIVATIONS
    ]


def measured_harmonics(
        activation: str,
        amplitude: float,
        count: int,
        gate: bool = True,
        samples: int = 2 ** 18,
) -> torch.Tensor:
    """Amplitudes of the harmonics of act(x) * x, x = A sin(t), by a discrete Fourier transform of one period.

    Args:
        activation: Name of an activation of timm.
        amplitude: Amplitude A of the tone.
        count: Number of harmonics, the mean included.
        gate: Whether act(x) is multiplied by x.
        samples: Samples of the period; harmonics beyond half of them fold back.

    Returns:
        Amplitudes (count,), float64, index n for harmonic n.
    """
    x = amplitude * torch.sin(2 * math.pi * torch.arange(samples, dtype=torch.float64) / samples)
    y = get_act_layer(activation)()(x)
    spectrum = torch.fft.rfft(y * x if gate else y, norm='forward').abs()[:count]
    spectrum[1:] *= 2
    return spectrum


def closed_form_harmonics(activation: str, amplitude: float, count: int) -> torch.Tensor:
    """Amplitudes of the harmonics of act(x) * x, x = A sin(t), from the Fourier coefficients of this module's head.

    Args:
        activation: One of `ACTIVATIONS`.
        amplitude: Amplitude A of the tone.
        count: Number of harmonics, the mean included.

    Returns:
        Amplitudes (count,), float64, index n for harmonic n.
    """
    square = {0: amplitude ** 2 / 2, 2: amplitude ** 2 / 2}  # of x * x
    if activation == 'identity':
        coefficients = [square.get(n, 0.) for n in range(count)]
    elif activation in ('relu', 'relu6'):
        limit = 6. if activation == 'relu6' else math.inf
        coefficients = [_clipped_coefficient(n, amplitude, limit) for n in range(count)]
    elif activation == 'gelu':
        erf = _erf_coefficients(amplitude, count + 2)
        # x^2 / 2 = A^2 (1 + cos 2s) / 4, and cos 2s cos ns has halves at n - 2 and n + 2
        odd = [
            amplitude ** 2 / 4 * (erf.get(n, 0.) + (erf.get(abs(n - 2), 0.) + erf.get(n + 2, 0.)) / 2)
            for n in range(count)
        ]
        coefficients = [square.get(n, 0.) / 2 + odd[n] for n in range(count)]
    else:
        raise ValueError(f'activation must be one of {ACTIVATIONS}, got {activation}')
    return torch.tensor(coefficients, dtype=torch.float64).abs()


def decay_rate(activation: str, amplitude: float, gate: bool = True, first: int = 64, last: int = 4096) -> float:
    """Rate p at which the harmonics fall as n^-p, from their largest within two octaves.

    Args:
        activation: Name of an activation of timm.
        amplitude: Amplitude A of the tone.
        gate: Whether act(x) is multiplied by x.
        first: First harmonic of the lower octave.
        last: First harmonic of the upper octave.

    Returns:
        p, infinity where the upper octave holds nothing above rounding (1e-13 of the largest harmonic).
    """
    harmonics = measured_harmonics(activation, amplitude, 2 * last, gate=gate)
    # the largest of an octave: zeros and the beat of two kinks make single harmonics vanish
    lower, upper = (harmonics[n:2 * n].max().item() for n in (first, last))
    if upper < 1e-13 * harmonics.max():
        return math.inf
    return math.log(lower / upper) / math.log(last / first)


def _clipped_coefficient(n: int, amplitude: float, limit: float) -> float:
    """Cosine coefficient n of min(x, limit) * x where x = A cos(s) > 0, and 0 elsewhere."""
    phi = math.acos(limit / amplitude) if amplitude > limit else 0.

    def integral(k: int, lower: float, upper: float) -> float:  # of cos(k s)
        return (math.sin(k * upper) - math.sin(k * lower)) / k if k else upper - lower

    clipped = 0. if phi == 0. else limit * amplitude * (integral(n - 1, 0., phi) + integral(n + 1, 0., phi)) / 2
    edge = math.pi / 2
    squared = amplitude ** 2 * (
        integral(n, phi, edge) / 2 + (integral(n - 2, phi, edge) + integral(n + 2, phi, edge)) / 4)
    return (clipped + squared) * (1 if n == 0 else 2) / math.pi


def _erf_coefficients(amplitude: float, count: int) -> dict[int, float]:
    """Cosine coefficients E_n, n odd, of erf(A cos(s) / sqrt 2)."""
    ive = require_scipy('special').ive  # exp(-q) I_m(q)
    bessel = ive(range(count // 2 + 2), amplitude ** 2 / 4).tolist()
    scale = amplitude * math.sqrt(2 / math.pi)
    return {
        2 * m + 1: (-1) ** m * scale * (bessel[m] + bessel[m + 1]) / (2 * m + 1)
        for m in range(count // 2 + 1)
    }
