"""Radial power spectra of a model's features: before and after its modules, and of both operands of its gates."""
import contextlib
import dataclasses
import fnmatch
import functools
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gmnet_timm.errors import UserError, listed
from gmnet_timm.frequency.gaussian import predict_independent, predict_pointwise
from gmnet_timm.frequency.progress import progress
from gmnet_timm.frequency.split import bin_power, modes_per_bin, power_spectrum
from gmnet_timm.frequency.tracing import Layout, Product, Recorder, Trace, stated_layout, trace, watch_modules

__all__ = ['GateStatistics', 'LayerSpectrum', 'Signal', 'find_blocks', 'layer_spectra']

KINDS = ('gate', 'activation', 'attention')


@dataclasses.dataclass(frozen=True)
class Signal:
    """Power of one tensor, the mean over its channels.

    Attributes:
        layout: How the tensor was read as maps: 'NCHW', 'NHWC', 'NLC', 'NCL', or 'other' such as windows.
        size: (H, W) of the maps. Bin k is k cycles per image, whatever the size.
        power: Sum of each radial bin, (images, bins), float64.
    """

    layout: str
    size: tuple[int, int]
    power: torch.Tensor

    @property
    def cutoff(self) -> int:
        """Last bin that counts as low: half of the Nyquist radius."""
        return max(1, min(self.size) // 4)

    @property
    def per_mode(self) -> torch.Tensor:
        """Mean power per frequency of each bin, (bins,). Sums per bin fall towards the corner, where bins are cut."""
        return self.power.mean(0) / modes_per_bin(*self.size)

    @property
    def high_low_ratio(self) -> float:
        """Energy beyond the cutoff over energy up to it, without the mean; NaN for maps without both."""
        return _high_low(self.power.mean(0), self.cutoff)

    @property
    def high_low_ratios(self) -> list[float]:
        """The same of each image."""
        return [_high_low(power, self.cutoff) for power in self.power]


@dataclasses.dataclass(frozen=True)
class GateStatistics:
    """What a gate does beside its spectra.

    Attributes:
        pre_gate_std: Standard deviation over images, channels and positions of what enters the gate's activation, of
            the gate operand itself where there is none.
        gate_std: The same of the gate operand.
        value_std: The same of the value operand.
        clipped_low: Share of gate values that equal the smallest one of their batch, as values clipped at 0 do.
        clipped_high: Share that equals the largest one, as values clipped at 6 or saturated at 1 do.
        gain: Energy of the product over energy of the value operand, both without the mean.
        aliased: Share of the product's energy without the mean that lies beyond the frequencies of the map, and so
            folds back, measured by the same product on a grid that is twice as fine, for the first images.
        predicted: Power of each radial bin by theory, (bins,), None where there is none.
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
    predicted: torch.Tensor | None
    theory: str
    value_mean: torch.Tensor
    value_power: torch.Tensor


@dataclasses.dataclass(frozen=True)
class LayerSpectrum:
    """Spectra of one module or one gate.

    Attributes:
        name: Of the module, '#2' for its second call or product.
        kind: 'module', 'gate', 'activation' or 'attention'.
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
        log = (self.after.power / self.before.power).log()
        mean = log.mean(0)
        half = 1.959964 * log.std(0) / len(log) ** .5 if len(log) > 1 else torch.full_like(mean, math.nan)
        gain, low, high = (torch.where(x.isfinite(), x.exp(), math.nan) for x in (mean, mean - half, mean + half))
        return gain, low, high

    def as_rows(self) -> list[dict[str, Any]]:
        """One row per signal and radial bin for a CSV."""
        rows = []
        gain = self.gain()
        for name, signal in self.signals.items():
            per_mode = signal.per_mode.tolist()
            bounds = gain if gain is not None and signal is self.after else None
            predicted = self.statistics.predicted if self.statistics is not None and name == 'product' else None
            for k, power in enumerate(signal.power.mean(0).tolist()):
                rows.append(dict(
                    layer=self.name, kind=self.kind, signal=name, layout=signal.layout, height=signal.size[0],
                    width=signal.size[1], images=len(signal.power), radius=k, power=power, power_per_mode=per_mode[k],
                    predicted_power='' if predicted is None else predicted[k].item(),
                    **{key: '' if bounds is None else bounds[i][k].item()
                       for i, key in enumerate(('gain', 'gain_low', 'gain_high'))},
                ))
        return rows

    def summary_row(self) -> dict[str, Any]:
        """One row for a CSV: ratios of high to low energy, and a gate's statistics."""
        row: dict[str, Any] = dict(layer=self.name, kind=self.kind)
        for name in ('input', 'output', 'gate', 'value', 'product'):
            signal = self.signals.get(name)
            row[f'{name}_size'] = '' if signal is None else f'{signal.size[0]}x{signal.size[1]}'
            row[f'{name}_high_low'] = '' if signal is None else signal.high_low_ratio
        statistics = self.statistics
        for name in (
                'pre_gate_std', 'gate_std', 'value_std', 'clipped_low', 'clipped_high', 'gain', 'aliased', 'theory'):
            row[name] = '' if statistics is None else getattr(statistics, name)
        row['predicted_high_low'] = ''
        if statistics is not None and statistics.predicted is not None:
            row['predicted_high_low'] = _high_low(statistics.predicted, self.signals['product'].cutoff)
        return row


def find_blocks(found: Trace) -> list[str]:
    """The blocks of a model: called modules with parts, numbered in their names, that contain no other such module."""
    numbered = {
        name for (name, side), layout in found.modules.items()
        if side == 'output' and layout is not None and re.search(r'(^|[._])\d+$', name) and '#' not in name
        and any(True for _ in found.classes[name].children())
    }
    return [
        name for name in dict.fromkeys(name for name, _ in found.modules)
        if name in numbered and not any(other.startswith(f'{name}.') for other in numbered)
    ]


def layer_spectra(
        model: nn.Module,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        modules: Sequence[str] | None = None,
        *,
        gates: Sequence[str] | None = None,
        kinds: Sequence[str] = ('gate',),
        layout: str | None = None,
        window: str | None = None,
        channels: int | None = None,
        alias_images: int = 4,
        show_progress: bool = False,
) -> list[LayerSpectrum]:
    """Mean radial power spectra of layers over a set of images.

    Args:
        model: Any model that takes images, run on the device and in the mode it is left in.
        loader: Batches of normalised images (B, C, H, W) and labels.
        modules: Names of modules or patterns such as 'stages.*.blocks.0', whose input and output are looked at.
        gates: Names or patterns of products to look at. With neither, all gates; the blocks of a model without gates.
        kinds: 'gate' (an entry per position and channel in both operands), 'attention' (one operand is broadcast, as in
            squeeze-and-excitation), 'activation' (x * (f(x) / x)).
        layout: 'NCHW', 'NHWC', 'NLC' or 'NCL' where the layout of the named modules is known better than it is found.
        window: None or 'hann', as for `radial_power_spectrum`.
        channels: Look at this many channels of each map, evenly spaced, None for all. Spectra of all channels can cost
            more than the passes that they watch.
        alias_images: Number of images for aliased energy, 0 for none.
        show_progress: Show how far it is.

    Returns:
        One entry per call of a module or product, in the model's order.

    Raises:
        UserError: A name matches nothing, a module is not called or holds no maps, or there are no images.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f'The kinds are {", ".join(KINDS)}, got {", ".join(unknown)}.')
    if channels is not None and channels < 1:
        raise UserError(f'The number of channels must be positive, got {channels}.')
    device = next(model.parameters(), torch.empty(0)).device
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise UserError('There is no image to look at.')
    images = first[0][:2].to(device)
    found = trace(model, images, activations='activation' in kinds)
    products = {name: entry for name, entry in found.products.items() if entry[0] in kinds}
    chosen_gates: list[str] = []
    if gates is not None or modules is None:
        chosen_gates = _match(gates or ['*'], list(products), 'gate', may_be_none=not gates)
    if modules is None and gates is None and not chosen_gates:
        modules = find_blocks(found)
    layouts = module_layouts(model, found, modules or [], layout, images)
    gate_layouts = _gate_layouts({name: products[name] for name in chosen_gates})
    if not layouts and not gate_layouts:
        raise UserError('The model has no gates and no blocks that hold maps. Name the modules to look at.')

    spectra: dict[tuple[str, str], list[torch.Tensor]] = {}
    collectors = {
        name: _Gate(kind, layouts_, window, channels, alias_images)
        for name, (kind, layouts_) in gate_layouts.items()
    }

    def on_module(name: str, side: str, x: torch.Tensor) -> None:
        found_layout = layouts.get((name, side))
        if found_layout is not None:
            with recorder.pause() if recorder is not None else contextlib.nullcontext():
                spectra.setdefault((name, side), []).append(_spectrum(_some(found_layout.maps(x), channels), window))

    def on_product(product: Product) -> None:
        if product.name in collectors:
            collectors[product.name].add(product)

    recorder: Recorder | None = None
    names = list(dict.fromkeys(name.partition('#')[0] for name, _ in layouts))
    with torch.no_grad(), watch_modules(model, names, on_module):
        for batch, *_ in progress(itertools.chain([first], batches), 'layers', 'batch', show=show_progress):
            batch = batch.to(device)
            with contextlib.ExitStack() as stack:
                if collectors:
                    recorder = Recorder(batch, on_product, activations='activation' in kinds)
                    everything = [name for name, _ in model.named_modules()]
                    stack.enter_context(watch_modules(model, everything, lambda *_: None, recorder.running))
                    stack.enter_context(recorder)
                model(batch)
    results = [collector.result(name) for name, collector in collectors.items()]
    for name in dict.fromkeys(name for name, _ in layouts):
        signals = {
            side: Signal(layouts[name, side].name, layouts[name, side].size, torch.cat(spectra[name, side]))
            for side in ('input', 'output') if (name, side) in layouts
        }
        results.append(LayerSpectrum(name, 'module', signals))
    return results


def _match(patterns: Sequence[str], names: list[str], what: str, may_be_none: bool = False) -> list[str]:
    """Names that match, in their order; a name without '#' takes all calls."""
    chosen = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)
                or fnmatch.fnmatchcase(name.partition('#')[0], pattern)]
        if not hits and not may_be_none:
            near = [name for name in names if pattern.rpartition('.')[2].strip('*') in name] or names
            raise UserError(f'The model has no {what} {pattern} that runs. There are {listed(near)}.')
        chosen.update(hits)
    return [name for name in names if name in chosen]


def module_layouts(
        model: nn.Module,
        found: Trace,
        patterns: Sequence[str],
        layout: str | None,
        images: torch.Tensor,
) -> dict[tuple[str, str], Layout]:
    """Layouts of what enters and leaves the modules that match, by name and 'input' or 'output'."""
    existing = [name for name, _ in model.named_modules()]
    called = list(dict.fromkeys(name for name, _ in found.modules))
    for pattern in patterns:
        hits = [name for name in existing if fnmatch.fnmatchcase(name, pattern)]
        if hits and not any(name.partition('#')[0] in hits for name in called):
            raise UserError(f'The module {listed(hits)} is not called when the model runs.')
        if not hits and pattern not in called:
            raise UserError(f'The model has no module {pattern}. There are {listed(existing[1:])}.')
    layouts: dict[tuple[str, str], Layout] = {}
    if not patterns:
        return layouts
    shapes = _shapes(model, images) if layout is not None else {}
    for name in _match(patterns, called, 'module'):
        for side in ('input', 'output'):
            if layout is not None and (name, side) in shapes:
                prefix = getattr(model, 'num_prefix_tokens', 0) if 'L' in layout else 0
                layouts[name, side] = stated_layout(layout, shapes[name, side], images.shape, prefix)
            elif found.modules.get((name, side)) is not None:
                layouts[name, side] = found.modules[name, side]  # type: ignore[assignment]
        if not any((name, side) in layouts for side in ('input', 'output')):
            raise UserError(
                f'{name} has no maps as its input or output, or where their positions are cannot be found. If it has, '
                'state the layout (--layout NCHW, NHWC, NLC or NCL).')
    return layouts


def _shapes(model: nn.Module, images: torch.Tensor) -> dict[tuple[str, str], torch.Size]:
    shapes: dict[tuple[str, str], torch.Size] = {}
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad(), watch_modules(model, names, lambda name, side, x: shapes.update({(name, side): x.shape})):
        model(images)
    return shapes


def _gate_layouts(products: dict[str, Any]) -> dict[str, tuple[str, tuple[Layout | None, ...]]]:
    return {name: (kind, layouts) for name, (kind, layouts) in products.items() if layouts[2] is not None}


def _spectrum(maps: torch.Tensor, window: str | None) -> torch.Tensor:
    """Power (B, bins) of maps (B, C, H, W), mean over channels, float64 on the CPU."""
    maps = maps if maps.dtype == torch.float64 else maps.float()
    power = power_spectrum(maps, window).mean(1)
    return bin_power(power, *maps.shape[-2:]).double().cpu()


def _some(maps: torch.Tensor, channels: int | None) -> torch.Tensor:
    """Evenly spaced channels of maps (B, C, H, W)."""
    if channels is None or channels >= maps.shape[1]:
        return maps
    return maps[:, torch.arange(channels, device=maps.device) * maps.shape[1] // channels]


def _high_low(power: torch.Tensor, cutoff: int) -> float:
    low, high = power[1:cutoff + 1].sum().item(), power[cutoff + 1:].sum().item()
    return high / low if low and cutoff + 1 < len(power) else math.nan


@dataclasses.dataclass
class _Moments:
    """Sums of values, for a mean and a standard deviation."""

    count: int = 0
    total: float = 0.
    square: float = 0.

    def add(self, x: torch.Tensor) -> None:
        self.count += x.numel()
        self.total += x.sum(dtype=torch.float64).item()
        self.square += x.square().sum(dtype=torch.float64).item()

    @property
    def std(self) -> float:
        return math.sqrt(max(0., self.square / self.count - (self.total / self.count) ** 2))


@dataclasses.dataclass
class _Gate:
    """Collects what is measured of one gate over batches."""

    kind: str
    layouts: tuple[Layout | None, ...]
    window: str | None
    some_channels: int | None
    alias_images: int
    power: dict[str, list[torch.Tensor]] = dataclasses.field(default_factory=dict)
    channels: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # sums of means and of spectra by channel
    moments: dict[str, _Moments] = dataclasses.field(
        default_factory=lambda: {k: _Moments() for k in ('pre', 'gate', 'value')})
    clipped: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
    aliased: list[float] = dataclasses.field(default_factory=lambda: [0., 0.])
    seen: int = 0
    function: Any = None

    def add(self, product: Product) -> None:
        self.function = self._function_of(product)
        operands = dict(gate=product.gate, value=product.value, product=product.product)
        maps = {
            name: _some(layout.maps(x), self.some_channels)
            for (name, x), layout in zip(operands.items(), self.layouts) if layout is not None
        }
        if self.kind != 'attention':
            pre = maps['gate']
            if product.pre_gate is not None and self.layouts[0] is not None:
                pre = _some(self.layouts[0].maps(product.pre_gate), self.some_channels)
            for name, x in (('pre', pre), ('gate', maps['gate']), ('value', maps['value'])):
                self.moments[name].add(x)
            lowest, highest = maps['gate'].aminmax()
            low, high = ((maps['gate'] == end).sum().item() for end in (lowest, highest))
            for i, number in enumerate((low, 0 if lowest == highest else high, maps['gate'].numel())):
                self.clipped[i] += int(number)
        for name in maps:
            maps[name] = maps[name] if maps[name].dtype == torch.float64 else maps[name].float()
            power = power_spectrum(maps[name], self.window)
            radial = bin_power(power.mean(1), *maps[name].shape[-2:])
            self.power.setdefault(name, []).append(radial.double().cpu())
            if name != 'product' and self.kind != 'attention':
                if self.window is not None:
                    power = power_spectrum(maps[name])
                sums = self.channels.setdefault(name, [0, 0])
                sums[0] = sums[0] + maps[name].mean((-2, -1)).sum(0).double().cpu()
                sums[1] = sums[1] + power.sum(0).double().cpu()
        some = slice(0, max(0, self.alias_images - self.seen))
        self.seen += len(product.product) if self.layouts[2] is None else len(maps['product'])
        if self.kind != 'attention' and some.stop > 0:
            inside, total = _energy_on_a_finer_grid(maps['gate'][some], maps['value'][some], self.function)
            self.aliased = [self.aliased[0] + total - inside, self.aliased[1] + total]

    @staticmethod
    def _function_of(product: Product):
        """f of a product f(value), None where the operands have different sources."""
        if product.kind == 'activation':
            return product.function
        if product.gate is product.value:
            return torch.square
        if product.pre_gate is product.value and product.function is not None:
            return functools.partial(_gated, product.function)
        return None

    def result(self, name: str) -> LayerSpectrum:
        if not self.power:
            raise UserError(f'The gate {name} did not run in the last passes: the model does not always do the same.')
        names = ('gate', 'value', 'product')
        signals = {
            key: Signal(layout.name, layout.size, torch.cat(self.power[key]))
            for key, layout in zip(names, self.layouts) if layout is not None
        }
        if self.kind == 'attention':
            return LayerSpectrum(name, self.kind, signals)
        value, product = (signals[key].power.mean(0)[1:].sum().item() for key in ('value', 'product'))
        width = signals['value'].size[1]
        (gate_mean, gate_power), (mean, power) = (
            [x / self.seen for x in self.channels[key]] for key in ('gate', 'value'))
        if self.function is not None:
            predicted, theory = predict_pointwise(self.function, mean, power, width), 'gaussian'
        else:
            predicted, theory = predict_independent(gate_power, power, width), 'independent'
        low, high, count = self.clipped
        return LayerSpectrum(name, self.kind, signals, GateStatistics(
            pre_gate_std=self.moments['pre'].std,
            gate_std=self.moments['gate'].std,
            value_std=self.moments['value'].std,
            clipped_low=low / count if low > 1 else 0.,
            clipped_high=high / count if high > 1 else 0.,
            gain=product / value if value else math.nan,
            aliased=self.aliased[0] / self.aliased[1] if self.aliased[1] else math.nan,
            predicted=predicted,
            theory=theory,
            value_mean=mean,
            value_power=power,
        ))


def _gated(function: Any, x: torch.Tensor) -> torch.Tensor:
    return function(x) * x


def _energy_on_a_finer_grid(gate: torch.Tensor, value: torch.Tensor, function: Any) -> tuple[float, float]:
    """Energy of a product without its mean, that within the frequencies of the map and all, on a grid twice as fine."""
    height, width = value.shape[-2:]
    fine = _interpolated(value)
    product = function(fine) if function is not None else fine * _interpolated(gate)
    power = torch.fft.fft2(product, norm='forward').abs().square()
    power[..., 0, 0] = 0
    v, u = (torch.fft.fftfreq(2 * n, d=1 / (2 * n), device=value.device).abs() for n in (height, width))
    inside = (v[:, None] <= height / 2) & (u <= width / 2)
    return power[..., inside].sum().item(), power.sum().item()


def _interpolated(x: torch.Tensor) -> torch.Tensor:
    """Values (..., 2 H, 2 W) of the band-limited function through the values of maps (..., H, W)."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm='forward'), dim=(-2, -1))
    pad = (width - width // 2, width // 2, height - height // 2, height // 2)
    spectrum = torch.fft.ifftshift(nn.functional.pad(spectrum, pad), dim=(-2, -1))
    # the real part shares the Nyquist frequency between both signs
    return torch.fft.ifft2(spectrum, norm='forward').real
