"""Results of `layer_spectra`: power spectra of layers and gates, and what follows from them."""
import dataclasses
import math
from typing import Any

import torch

from gmnet_timm.frequency.intervals import normal_interval
from gmnet_timm.frequency.split import (
    bin_power,
    high_frequency_energy,
    modes_per_bin,
    spectral_centroid,
    spectral_slope,
)

SIGNAL_NAMES = {
    'input': 'input', 'output': 'output', 'gate': 'gate operand', 'value': 'value operand', 'product': 'product'}

__all__ = ['GateStatistics', 'LayerSpectrum', 'Signal']


@dataclasses.dataclass(frozen=True)
class Signal:
    """Power of one tensor, the mean over its channels.

    Attributes:
        layout: How the tensor was read as maps: 'NCHW', 'NHWC', 'NLC', 'NCL', or 'other' such as windows.
        size: (H, W) of the maps. Bin k is k cycles per image, whatever the size.
        power: Sum of each radial bin, (images, bins), float64.
        spectrum: Power by frequency, mean over images and channels, (H, W // 2 + 1), float64.
        channels: Number of channels that were looked at.
        all_channels: Number of channels that there are.
        high_error: Standard error of `high` that comes from the choice of channels, 0 for all of them.
    """

    layout: str
    size: tuple[int, int]
    power: torch.Tensor
    spectrum: torch.Tensor
    channels: int = 0
    all_channels: int = 0
    high_error: float = 0.

    @property
    def per_mode(self) -> torch.Tensor:
        """Mean power per frequency of each bin, (bins,). Sums per bin fall towards the corner, where bins are cut."""
        return self.power.mean(0) / modes_per_bin(*self.size)

    @property
    def high(self) -> float:
        """Energy beyond a quarter cycle per pixel relative to white noise, as of `high_frequency_energy`."""
        return high_frequency_energy(self.spectrum, self.size[1]).item()

    @property
    def centroid(self) -> float:
        """Mean frequency relative to white noise, as of `spectral_centroid`."""
        return spectral_centroid(self.spectrum, self.size[1]).item()

    @property
    def slope(self) -> float:
        """Of the spectrum in log-log, as of `spectral_slope`."""
        return spectral_slope(self.spectrum, self.size[1])


@dataclasses.dataclass(frozen=True)
class GateStatistics:
    """What a gate does besides its spectra.

    Attributes:
        pre_gate_std: Standard deviation over images, channels and positions of what enters the gate's activation, of
            the gate operand itself where there is none.
        gate_std: The same of the gate operand.
        value_std: The same of the value operand.
        clipped_low: Share of gate values that equal the smallest one, as values clipped at 0 do.
        clipped_high: Share that equals the largest one, as values clipped at 6 or saturated at 1 do.
        gain: Energy of the product over energy of the value operand, both without the mean.
        aliased: Share of the product's energy without the mean that lies beyond the frequencies of the map, and so
            folds back, measured by the same product on a grid that is twice as fine, for the first images.
        predicted: Power by frequency in theory, mean over channels, (H, W // 2 + 1).
        theory: 'gaussian' for a function of one input that is taken as Gaussian, 'independent' for two operands that
            are taken as independent.
        value_mean: Mean of each channel of the value operand, (C,), which theory takes.
        value_power: Its power spectrum by channel, (C, H, W // 2 + 1), which theory takes.
    """

    pre_gate_std: float
    gate_std: float
    value_std: float
    clipped_low: float
    clipped_high: float
    gain: float
    aliased: float
    predicted: torch.Tensor
    theory: str
    value_mean: torch.Tensor
    value_power: torch.Tensor


@dataclasses.dataclass(frozen=True)
class LayerSpectrum:
    """Spectra of one module or one gate.

    Attributes:
        name: Of the module, '#2' for its second call or product.
        kind: 'module', 'gate' or 'activation'.
        signals: 'input' and 'output' of a module (one of them where the other is not a map), or 'gate', 'value' and
            'product'.
        statistics: Of a gate or an activation.
    """

    name: str
    kind: str
    signals: dict[str, Signal]
    statistics: GateStatistics | None = None

    @property
    def before(self) -> Signal | None:
        """What the result is compared with: a module's input, or a gate's value operand."""
        return self.signals.get('input', self.signals.get('value'))

    @property
    def after(self) -> Signal | None:
        """The result: a module's output, or the product."""
        return self.signals.get('output', self.signals.get('product'))

    def gain(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Power after over power before, by radial bin; None where the size changes or one of them is missing.

        Returns:
            Geometric mean over images, and the bounds of its 95 % interval (normal, of the logarithm), each (bins,).
            The bounds are NaN for one image, all three are NaN for bins that are empty in some image.
        """
        if self.before is None or self.after is None or self.before.size != self.after.size:
            return None
        found = normal_interval((self.after.power / self.before.power).log())
        gain, low, high = (torch.where(x.isfinite(), x.exp(), math.nan) for x in found)
        return gain, low, high

    def as_rows(self) -> list[dict[str, Any]]:
        """One row per signal and radial bin for a CSV."""
        rows = []
        gain = self.gain()
        for name, signal in self.signals.items():
            per_mode = signal.per_mode.tolist()
            bounds = gain if gain is not None and signal is self.after else None
            predicted = None
            if name == 'product' and self.statistics is not None:
                predicted = bin_power(self.statistics.predicted, *signal.size)
            for k, power in enumerate(signal.power.mean(0).tolist()):
                rows.append(dict(
                    layer=self.name, kind=self.kind, signal=name, layout=signal.layout, height=signal.size[0],
                    width=signal.size[1], images=len(signal.power), channels=signal.channels, radius=k,
                    power=power, power_per_mode=per_mode[k],
                    predicted_power='' if predicted is None else predicted[k].item(),
                    **{key: '' if bounds is None else bounds[i][k].item()
                       for i, key in enumerate(('gain', 'gain_low', 'gain_high'))},
                ))
        return rows

    @property
    def predicted_high(self) -> float:
        """`Signal.high` of the product of a gate in theory, NaN for a module."""
        return math.nan if self.statistics is None else high_frequency_energy(
            self.statistics.predicted, self.signals['product'].size[1]).item()

    def described(self) -> dict[str, str]:
        """The summary in words, for a person."""
        def number(value: float) -> str:
            return f'{value:.4g}' if math.isfinite(value) else 'undefined'

        found = {
            f'{SIGNAL_NAMES[name]}, high': f'{number(signal.high)} ({signal.size[0]}×{signal.size[1]})'
            for name, signal in self.signals.items()}
        statistics = self.statistics
        if statistics is not None:
            found[f'product in theory ({statistics.theory}), high'] = number(self.predicted_high)
            found['aliased energy'] = f'{number(100 * statistics.aliased)} %'
            found['clipped below, above'] = (
                f'{100 * statistics.clipped_low:.1f} %, {100 * statistics.clipped_high:.1f} %')
            found['energy of product / value'] = number(statistics.gain)
            found['std before the gate'] = number(statistics.pre_gate_std)
        return found

    def summary_row(self) -> dict[str, Any]:
        """One row for a CSV: summaries of the spectra, and a gate's statistics."""
        row: dict[str, Any] = dict(layer=self.name, kind=self.kind)
        for name in ('input', 'output', 'gate', 'value', 'product'):
            signal = self.signals.get(name)
            row[f'{name}_size'] = '' if signal is None else f'{signal.size[0]}x{signal.size[1]}'
            row[f'{name}_channels'] = '' if signal is None else f'{signal.channels} of {signal.all_channels}'
            for measure in ('high', 'high_error', 'centroid', 'slope'):
                row[f'{name}_{measure}'] = '' if signal is None else getattr(signal, measure)
        statistics = self.statistics
        for name in (
                'pre_gate_std', 'gate_std', 'value_std', 'clipped_low', 'clipped_high', 'gain', 'aliased', 'theory'):
            row[name] = '' if statistics is None else getattr(statistics, name)
        row['predicted_high'] = '' if statistics is None else self.predicted_high
        return row
