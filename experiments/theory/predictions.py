"""What activations and gates do to a spectrum, in theory: exact for Gaussian maps and for pure tones.

`predict_maps` and `gate_rows` give the spectrum of f(x), aliasing included, for maps x of a given spectrum and scale
(standard deviation), which may be those that were measured in a network; maps count as Gaussian. Tones test the closed
forms. They show the power laws by which harmonics fall in the end, which say little at the scales that occur.

Harmonics of act(x) * x for x = A sin(t), measured and in closed form. With s = t - pi / 2 the tone is A cos(s) and
every such function is even in s, so that it is c_0 + sum of c_n cos(n s). The amplitude of harmonic n is |c_n|, c_0 is
the mean. The closed forms:

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
from collections.abc import Sequence
from typing import Any

import torch
from scipy import optimize, special
from timm.layers import get_act_layer

from experiments.comparisons import mean_interval
from experiments.variants import Variant
from gmnet_timm.errors import UserError
from gmnet_timm.frequency.gaussian import power_law, predict_pointwise
from gmnet_timm.frequency.signals import LayerSpectrum, Signal
from gmnet_timm.frequency.split import bin_power

__all__ = [
    'ACTIVATIONS', 'FUNCTIONS', 'Harmonics', 'MapPrediction', 'closed_form_harmonics', 'compare_harmonics',
    'decay_rate', 'energy_share', 'gate_rows', 'high_low', 'map_row', 'measured_harmonics', 'pointwise', 'predict_maps',
    'scale_where',
]

ACTIVATIONS = ('identity', 'relu', 'gelu', 'relu6')
FUNCTIONS = ('relu', 'relu6', 'gelu', 'relu*x', 'relu6*x', 'gelu*x', 'identity*x')


@dataclasses.dataclass(frozen=True)
class MapPrediction:
    """Prediction for f(x), x a Gaussian map.

    Attributes:
        function: Name of f, as of `Variant`.
        scale: Standard deviation of x.
        beyond_6: Share of the values of x beyond 6, where ReLU6 clips.
        input: Spectrum of x.
        output: Spectrum of f(x), aliasing included.
    """

    function: str
    scale: float
    beyond_6: float
    input: Signal
    output: Signal


def predict_maps(
        functions: Sequence[str] = FUNCTIONS,
        scales: Sequence[float] = (.8, 1.4, 3., 6., 12.),
        size: int = 64,
        exponent: float = 1.,
) -> list[MapPrediction]:
    """What each function does to Gaussian maps of mean 0 with the amplitude spectrum 1 / radius^exponent.

    Args:
        functions: Names of activations and gates, as for `Variant`.
        scales: Standard deviations of the maps.
        size: Height and width of the maps.
        exponent: 0 for white maps, 1 for the spectrum of natural images.
    """
    predictions = []
    for scale in scales:
        power = power_law(size, exponent) * scale ** 2
        before = _signal(predict_pointwise(torch.nn.Identity(), torch.zeros(1), power, size), size)
        for name in functions:
            after = _signal(predict_pointwise(pointwise(name), torch.zeros(1), power, size), size)
            beyond = math.erfc(6 / scale / math.sqrt(2)) / 2
            predictions.append(MapPrediction(name, scale, beyond, before, after))
    return predictions


def map_row(prediction: MapPrediction) -> dict[str, Any]:
    """A prediction as a row for a CSV."""
    return dict(
        function=prediction.function, std=prediction.scale, beyond_6=prediction.beyond_6,
        input_high_low=high_low(prediction.input), output_high_low=high_low(prediction.output))


def scale_where(first: str, second: str, ratio: float, size: int = 64, exponent: float = 1.) -> float:
    """Scale at which high/low of the first function is `ratio` times that of the second, infinity where it never is.

    Searched for from 0.1 to 1,000: the smallest such scale on a grid of 6 per decade, refined.
    """
    def difference(log_scale: float) -> float:
        a, b = (high_low(p.output) for p in predict_maps((first, second), [10 ** log_scale], size, exponent))
        return a / b - ratio

    grid = [i / 6 - 1 for i in range(25)]
    values = [difference(x) for x in grid]
    for x, y, a, b in zip(grid, grid[1:], values, values[1:]):
        if a * b <= 0:
            return 10 ** float(optimize.brentq(difference, x, y, xtol=1e-4))
    return math.inf


def gate_rows(layers: Sequence[LayerSpectrum], functions: Sequence[str] = FUNCTIONS) -> list[dict[str, Any]]:
    """Of each gate of a model: high/low of its input and product as measured, and of products in theory.

    Theory takes the measured mean and power spectrum of every channel of the value operand, and treats it as Gaussian.

    Args:
        layers: Gates from `layer_spectra`.
        functions: Activations and gates that could stand in this place, as for `Variant`.

    Returns:
        One row per gate whose map has high and low frequencies. `gain` is high/low of the product over that of the
        input, a geometric mean over images with Student's 95 % interval.

    Raises:
        UserError: No layer is a gate with such maps.
    """
    rows = []
    for layer in layers:
        statistics = layer.statistics
        value = layer.signals.get('value')
        if statistics is None or value is None or math.isnan(high_low(value)):
            continue
        product = layer.signals['product']
        gain = mean_interval([math.log(b / a) for a, b in zip(_each_high_low(value), _each_high_low(product))])
        row: dict[str, Any] = dict(
            layer=layer.name, size='x'.join(map(str, product.size)), images=len(product.power),
            pre_gate_std=statistics.pre_gate_std, clipped_high=statistics.clipped_high,
            value_high_low=high_low(value), product_high_low=high_low(product),
            **{key: math.exp(x) for key, x in zip(('gain', 'gain_low', 'gain_high'), gain)},
            theory=statistics.theory, predicted_high_low=_ratio(statistics.predicted, product))
        for name in functions:
            row[f'predicted_{name}'] = _ratio(predict_pointwise(
                pointwise(name), statistics.value_mean, statistics.value_power, value.size[1]), value)
        rows.append(row)
    if not rows:
        raise UserError(
            'The model has no gate whose maps have high and low frequencies. If it has gates, use larger images '
            '(--img-size).')
    return rows


def pointwise(name: str) -> Variant:
    """A function of one map by name.

    Raises:
        UserError: It needs a second map.
    """
    function = Variant(name)
    if function.branches > 1:
        raise UserError(f'{name} depends on a second map: theory knows ACTIVATION and ACTIVATION*x.')
    return function


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


def energy_share(amplitudes: torch.Tensor, first: int) -> float:
    """Share of the energy without the mean in harmonics from `first` on, for the amplitudes of harmonics 0, 1, 2, …"""
    energies = amplitudes.square()
    return (energies[first:].sum() / energies[1:].sum()).item()


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


def high_low(signal: Signal) -> float:
    """Energy beyond half of the Nyquist radius over the rest, without the mean; NaN where one has no bins.

    It depends on the size of the map: compare maps of one size only.
    """
    return _ratio_of_bins(signal.power.mean(0), signal.size)


def _each_high_low(signal: Signal) -> list[float]:
    return [_ratio_of_bins(power, signal.size) for power in signal.power]


def _ratio_of_bins(power: torch.Tensor, size: tuple[int, int]) -> float:
    cutoff = max(1, min(size) // 4)
    low, high = power[1:cutoff + 1].sum().item(), power[cutoff + 1:].sum().item()
    return high / low if low and cutoff + 1 < len(power) else math.nan


def _signal(power: torch.Tensor, size: int) -> Signal:
    return Signal('NCHW', (size, size), bin_power(power, size, size)[None], power)


def _ratio(power: torch.Tensor | None, like: Signal) -> float:
    """High/low of a predicted spectrum for maps of the size of a measured one."""
    return math.nan if power is None else _ratio_of_bins(bin_power(power, *like.size), like.size)


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
    ive = special.ive  # exp(-q) I_m(q)
    bessel = ive(range(count // 2 + 2), amplitude ** 2 / 4).tolist()
    scale = amplitude * math.sqrt(2 / math.pi)
    return {
        2 * m + 1: (-1) ** m * scale * (bessel[m] + bessel[m + 1]) / (2 * m + 1)
        for m in range(count // 2 + 1)
    }
