"""What is measured of layers, batch by batch and process by process, until it becomes a `LayerSpectrum`."""
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.gaussian import predict_independent, predict_pointwise
from gmnet_timm.frequency.positions import Layout
from gmnet_timm.frequency.processes import interleaved
from gmnet_timm.frequency.signals import GateStatistics, LayerSpectrum, Signal
from gmnet_timm.frequency.split import bin_power, high_and_total_energy, high_frequency_energy, power_spectrum
from gmnet_timm.frequency.tracing import Product

__all__ = ['GateTally', 'ModuleTally', 'Tally']

_CACHED = 1 << 18  # entries of maps, 1 MiB


@dataclasses.dataclass
class Tally:
    """Spectra of one tensor.

    Attributes:
        layout: How it is read.
        power: Of each batch, sum of each radial bin, mean over channels, (B, bins), float64.
        channels: Number of channels looked at.
        all_channels: Number of channels there are.
        by_channel: Sum over images of the power spectrum of each channel, (C, H, W // 2 + 1).
        mean: Sum over images of the mean of each channel, (C,), for gate and value.
        spectrum: As `by_channel` but without a window, for gate and value.
    """

    layout: Layout
    power: list[torch.Tensor] = dataclasses.field(default_factory=list)
    channels: int = 0
    all_channels: int = 0
    by_channel: Any = 0
    mean: Any = 0
    spectrum: Any = 0

    def read(self, x: torch.Tensor, channels: int | None) -> torch.Tensor:
        """Maps (B, C, H, W) of this many channels, in float32 or float64."""
        if not self.all_channels:
            self.all_channels = self.layout.maps(x[:self.layout.per_image]).shape[1]
        maps = self.layout.maps(x, channels)
        self.channels = maps.shape[1]
        return maps if maps.dtype == torch.float64 else maps.float()

    def add(self, maps: torch.Tensor, window: str | None, operand: bool = False) -> None:
        """Add maps; `operand` for those of which theory wants more."""
        height, width = maps.shape[-2:]
        power = power_spectrum(maps, window)
        if not power.isfinite().all():
            raise UserError('A feature is NaN or infinite: the weights are damaged or have diverged.')
        self.power.append(bin_power(power.mean(1).double(), height, width).cpu())
        total = power.sum(0).double().cpu()
        self.by_channel = self.by_channel + total
        if operand:
            self.mean = self.mean + maps.mean((-2, -1)).sum(0).double().cpu()
            plain = total if window is None else power_spectrum(maps).sum(0).double().cpu()
            self.spectrum = self.spectrum + plain

    def std(self) -> float:
        """Standard deviation over images, channels and positions."""
        count = self.channels * sum(map(len, self.power))
        square = bin_power(self.spectrum, *self.layout.size).sum().item()  # Parseval
        return math.sqrt(max(0., square / count - (self.mean.sum().item() / count) ** 2))

    def signal(self) -> Signal:
        power = torch.cat(self.power)
        error = 0. if self.channels == self.all_channels else _high_error(
            self.by_channel, self.layout.size[1], self.channels / self.all_channels)
        return Signal(
            self.layout.name, self.layout.size, power, self.by_channel.mean(0) / len(power), self.channels,
            self.all_channels, error)

    @staticmethod
    def merged(parts: 'Sequence[Tally]') -> 'Tally':
        sums = {name: sum(getattr(part, name) for part in parts) for name in ('by_channel', 'mean', 'spectrum')}
        return dataclasses.replace(
            parts[0], power=[interleaved([torch.cat(part.power) for part in parts])], **sums)


def _high_error(by_channel: torch.Tensor, width: int, share: float) -> float:
    """Standard error of `high_frequency_energy` from the choice of channels, for this share of all."""
    high, total = high_and_total_energy(by_channel, width)
    count = len(by_channel)
    if count < 2 or not total.sum() or not high.sum():
        return math.nan
    residual = high - high.sum() / total.sum() * total
    error = math.sqrt((1 - share) * residual.square().sum().item() / (count - 1) / count) / total.mean().item()
    return error * high_frequency_energy(by_channel.sum(0), width).item() / (high.sum() / total.sum()).item()


@dataclasses.dataclass
class ModuleTally:
    """Spectra of what enters and leaves a module."""

    signals: dict[str, Tally]

    def add(self, side: str, x: torch.Tensor, window: str | None, channels: int | None) -> None:
        tally = self.signals[side]
        tally.add(tally.read(x, channels), window)

    def merged(self, parts: 'Sequence[ModuleTally]') -> 'ModuleTally':
        return ModuleTally({side: Tally.merged([part.signals[side] for part in parts]) for side in self.signals})

    def result(self, name: str) -> LayerSpectrum:
        return LayerSpectrum(name, 'module', {side: tally.signal() for side, tally in self.signals.items()})


@dataclasses.dataclass
class GateTally:
    """Spectra of the operands and the product of a gate, and its statistics.

    Attributes:
        kind: As of `LayerSpectrum`.
        signals: Of gate, value and product.
        alias_images: Number of images of this process for aliased energy.
        pre: Number, sum and sum of squares of the values that enter the activation, where they are no operand.
        pre_is_value: The activation takes the value operand.
        ends: Smallest and largest gate value.
        clipped: How many gate values equal the smallest and the largest, and how many there are.
        aliased: Aliased and all energy.
        function: f of a product f(value).
    """

    kind: str
    signals: dict[str, Tally]
    alias_images: int
    pre: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    pre_is_value: bool = False
    ends: tuple[float, float] = (math.inf, -math.inf)
    clipped: tuple[int, int, int] = (0, 0, 0)
    aliased: tuple[float, float] = (0., 0.)
    function: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of(cls, kind: str, layout: Layout, alias_images: int) -> 'GateTally':
        return cls(kind, {name: Tally(layout) for name in ('gate', 'value', 'product')}, alias_images)

    def add(self, product: Product, window: str | None, channels: int | None) -> None:
        """Add the product of a batch, by parts of it whose maps and spectra stay in a processor's cache."""
        for part in _parts(product, self.signals['product'].layout, channels):
            self._add(part, window, channels)

    def _add(self, product: Product, window: str | None, channels: int | None) -> None:
        maps = {name: tally.read(getattr(product, name), channels) for name, tally in self.signals.items()}
        for name, tally in self.signals.items():
            tally.add(maps[name], window, operand=name != 'product')
        self.function = _function_of(product)
        self.pre_is_value = _is_same(product.pre_gate, product.value)
        if product.pre_gate is not None and not self.pre_is_value:
            x = self.signals['gate'].layout.maps(product.pre_gate, channels)
            self.pre += torch.tensor([
                x.numel(), x.sum(dtype=torch.float64), x.square().sum(dtype=torch.float64)], dtype=torch.float64)
        lowest, highest = (x.item() for x in maps['gate'].aminmax())
        low, high = int((maps['gate'] <= lowest).count_nonzero()), int((maps['gate'] >= highest).count_nonzero())
        self._add_ends((lowest, highest), low, high, maps['gate'].numel())
        if self.alias_images:
            some = slice(0, self.alias_images)
            self.alias_images -= len(maps['value'][some])
            inside, total = _energy_on_a_finer_grid(maps['gate'][some], maps['value'][some], self.function)
            self.aliased = self.aliased[0] + total - inside, self.aliased[1] + total

    def _add_ends(self, ends: tuple[float, float], low: int, high: int, count: int) -> None:
        """Count values at the smallest and largest value of all: the counts at an end that is passed are dropped."""
        old_low, old_high = self.clipped[:2]
        low = (low if ends[0] <= self.ends[0] else 0) + (old_low if self.ends[0] <= ends[0] else 0)
        high = (high if ends[1] >= self.ends[1] else 0) + (old_high if self.ends[1] >= ends[1] else 0)
        self.ends = min(ends[0], self.ends[0]), max(ends[1], self.ends[1])
        self.clipped = low, high, self.clipped[2] + count

    def merged(self, parts: 'Sequence[GateTally]') -> 'GateTally':
        whole = dataclasses.replace(
            self,
            signals={name: Tally.merged([part.signals[name] for part in parts]) for name in self.signals},
            pre=torch.stack([part.pre for part in parts]).sum(0),
            aliased=(math.fsum(part.aliased[0] for part in parts), math.fsum(part.aliased[1] for part in parts)),
            ends=(math.inf, -math.inf),
            clipped=(0, 0, 0),
        )
        for part in parts:
            whole._add_ends(part.ends, *part.clipped)
        return whole

    def result(self, name: str) -> LayerSpectrum:
        if not self.signals['product'].power:
            raise UserError(f'The gate {name} did not run in the last passes: the model does not always do the same.')
        signals = {key: tally.signal() for key, tally in self.signals.items()}
        return LayerSpectrum(name, self.kind, signals, self._statistics(signals))

    def _statistics(self, signals: dict[str, Signal]) -> GateStatistics:
        gate, value = self.signals['gate'], self.signals['value']
        energy, product = (signals[key].power.mean(0)[1:].sum().item() for key in ('value', 'product'))
        images = len(signals['value'].power)
        width = value.layout.size[1]
        if self.function is not None:
            predicted = predict_pointwise(self.function, value.mean / images, value.spectrum / images, width)
        else:
            predicted = predict_independent(gate.spectrum / images, value.spectrum / images, width)
        low, high, count = self.clipped
        return GateStatistics(
            pre_gate_std=self._pre_gate_std(),
            gate_std=gate.std(),
            value_std=value.std(),
            clipped_low=low / count if low > 1 else 0.,
            clipped_high=high / count if high > 1 and self.ends[0] < self.ends[1] else 0.,
            gain=product / energy if energy else math.nan,
            aliased=self.aliased[0] / self.aliased[1] if self.aliased[1] else math.nan,
            predicted=predicted,
            theory='independent' if self.function is None else 'gaussian',
            value_mean=value.mean / images,
            value_power=value.spectrum / images,
        )

    def _pre_gate_std(self) -> float:
        count, total, square = self.pre.tolist()
        if not count:
            return self.signals['value' if self.pre_is_value else 'gate'].std()
        return math.sqrt(max(0., square / count - (total / count) ** 2))


def _parts(product: Product, layout: Layout, channels: int | None) -> Iterator[Product]:
    """The same product of a few images after the other."""
    rows = len(product.product)
    images = rows // layout.per_image
    positions = math.prod(layout.size)
    all_channels = product.product.numel() // (images * positions)
    entries = positions * min(all_channels, channels or all_channels)
    count = max(1, _CACHED // entries) * layout.per_image
    if count >= rows or product.product.device.type != 'cpu':
        yield product
        return
    names = [key for key in ('gate', 'value', 'product', 'pre_gate') if getattr(product, key) is not None]
    for start in range(0, rows, count):
        yield dataclasses.replace(product, **{key: getattr(product, key)[start:start + count] for key in names})


def _function_of(product: Product) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """f of a product f(value), None where the operands have different sources."""
    if product.kind == 'activation':
        return product.function
    if _is_same(product.gate, product.value):
        return torch.square
    function = product.function
    return (lambda x: function(x) * x) if function is not None and _is_same(product.pre_gate, product.value) else None


def _is_same(x: torch.Tensor | None, y: torch.Tensor) -> bool:
    """True for the same values in memory, such as two views of one tensor."""
    return x is not None and (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())


def _energy_on_a_finer_grid(gate: torch.Tensor, value: torch.Tensor, function: Any) -> tuple[float, float]:
    """Energy of a product without its mean, that within the frequencies of the map and all, on a grid twice as fine."""
    height, width = value.shape[-2:]
    fine = _interpolated(value)
    power = power_spectrum(function(fine) if function is not None else fine * _interpolated(gate))
    power = power.flatten(0, -3).sum(0).double()  # (2 H, W + 1)
    power[0, 0] = 0
    power[:, 1:width] *= 2  # with conjugates
    inside = torch.fft.fftfreq(2 * height, d=1 / (2 * height), device=power.device).abs() <= height / 2
    return power[inside, :width // 2 + 1].sum().item(), power.sum().item()


def _interpolated(x: torch.Tensor) -> torch.Tensor:
    """Values (..., 2 H, 2 W) of the band-limited function through the values of maps (..., H, W)."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.rfft2(x, norm='forward')
    if width % 2 == 0:
        spectrum[..., -1] /= 2  # both signs of the Nyquist frequency share it
    above = (height + 1) // 2  # rows from zero frequency on, then those from the Nyquist frequency on
    fine = spectrum.new_zeros(*x.shape[:-2], 2 * height, width + 1)
    fine[..., :above, :spectrum.shape[-1]] = spectrum[..., :above, :]
    fine[..., height + above:, :spectrum.shape[-1]] = spectrum[..., above:, :]
    if height % 2 == 0:
        fine[..., -above, :] /= 2
        fine[..., above, :] = fine[..., -above, :]
    return torch.fft.irfft2(fine, s=(2 * height, 2 * width), norm='forward')
