"""Plots of the frequency view: each draws into one Axes, its own or a given one, and returns it.

Dashes and markers tell lines apart, so that they can be read without colour.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gmnet_timm.errors import UserError, require
from gmnet_timm.frequency.amplitude import LogAmplitude
from gmnet_timm.frequency.heatmap import HeatmapPoint, radial_summary
from gmnet_timm.frequency.sensitivity import Sensitivity
from gmnet_timm.frequency.signals import SIGNAL_NAMES, LayerSpectrum
from gmnet_timm.frequency.split import bin_power, modes_per_bin, radial_power_spectrum

__all__ = [
    'LINES', 'displayable', 'plot_accuracy', 'plot_gain', 'plot_heatmap', 'plot_image_spectrum',
    'plot_log_amplitude', 'plot_radial_error', 'plot_sensitivity', 'plot_spectrum',
]

LINES: list[dict[str, Any]] = [
    dict(linestyle='-', marker='o', color='black'),
    dict(linestyle='--', marker='s', color='#0072b2', markerfacecolor='white'),
    dict(linestyle='-.', marker='^', color='#d55e00'),
    dict(linestyle=':', marker='D', color='#777777', markerfacecolor='white'),
    dict(linestyle=(0, (5, 1)), marker='v', color='#009e73'),
    dict(linestyle=(0, (1, 1)), marker='X', color='#aa4499'),
    dict(linestyle=(0, (3, 1, 1, 1)), marker='P', color='#e69f00'),
    dict(linestyle='-', marker='*', color='#56b4e9', markerfacecolor='white'),
]
_SIGNAL_STYLES = {'input': 1, 'output': 0, 'gate': 2, 'value': 1, 'product': 0}


def plot_accuracy(
        lines: Mapping[str, Sequence[tuple[float, float, float, float]]],
        ax: Any = None,
        *,
        chance: float | None = None,
) -> Any:
    """Draw accuracies with their intervals.

    Args:
        lines: Points (x, percent, lower bound, upper bound) by label; bounds that are NaN are not drawn.
        ax: Axes of matplotlib, by default new ones.
        chance: Accuracy at chance in percent, drawn as a line.
    """
    ax = _own(ax)
    from matplotlib.transforms import offset_copy
    for i, (label, points) in enumerate(lines.items()):
        if not points:
            continue
        x, middle, low, high = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
        aside = 3 * (i - (len(lines) - 1) / 2)  # points of the page, so that bars do not hide each other
        errors = torch.stack([middle - low, high - middle]).nan_to_num(0.).clamp(min=0)
        ax.errorbar(
            x, middle, yerr=errors, label=label, markersize=4.5, linewidth=1.3, elinewidth=.8, capsize=1.5,
            transform=offset_copy(ax.transData, ax.figure, aside, units='points'), **LINES[i % len(LINES)])
        ax.update_datalim([*zip(x, low.nan_to_num(100.)), *zip(x, high.nan_to_num(0.)), *zip(x, middle)])
    ax.autoscale_view()
    if chance is not None:
        ax.axhline(chance, color='gray', linewidth=.8, linestyle=(0, (2, 2)), label='chance')
    ax.set_ylim(bottom=0)
    ax.grid(alpha=.3)
    return ax


def plot_spectrum(layer: LayerSpectrum, ax: Any = None) -> Any:
    """Draw the mean power per frequency of each signal of a layer relative to its energy without the mean.

    A dotted line is what theory predicts for the product of a gate. A grey line marks a quarter cycle per pixel, beyond
    which frequencies are high.
    """
    ax = _own(ax)
    for name, signal in layer.signals.items():
        energy = signal.power.mean(0)[1:].sum()
        values = signal.per_mode[1:] / energy
        _log_line(ax, values, label=SIGNAL_NAMES[name], **LINES[_SIGNAL_STYLES[name]])
    statistics = layer.statistics
    if statistics is not None:
        size = layer.signals['product'].size
        predicted = bin_power(statistics.predicted, *size)
        values = (predicted / modes_per_bin(*size))[1:] / predicted[1:].sum()
        _log_line(ax, values, label='predicted product', linestyle=':', color='#aa4499', linewidth=1.8)
    after = layer.after
    if after is not None:
        ax.axvline(min(after.size) / 4, color='gray', linewidth=.8)
        before = f'{layer.before.high:.2g} → ' if layer.before is not None else ''
        ax.text(.97, .95, f'high {before}{after.high:.2g}', transform=ax.transAxes, ha='right', va='top',
                fontsize=8)
    ax.grid(alpha=.3)
    return ax


def plot_gain(layer: LayerSpectrum, ax: Any = None) -> Any:
    """Draw power after over power before by radius, with its 95 % interval over images and a line at 1.

    Raises:
        UserError: The layer changes resolution, or has no maps on one side.
    """
    found = layer.gain()
    if found is None:
        raise UserError(f'{layer.name} has no gain: it changes resolution, or has maps on one side only.')
    ax = _own(ax)
    gain, low, high = (values[1:] for values in found)
    radii = range(1, len(gain) + 1)
    ax.semilogy(radii, gain, label='after / before', markersize=3, **LINES[0])
    ax.fill_between(radii, low, high, color='gray', alpha=.4, label='95 % interval over images')
    ax.axhline(1, color='gray', linewidth=.8, label='gain 1')
    from matplotlib.ticker import LogLocator
    ax.yaxis.set_major_formatter('{x:g}')
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter('{x:g}')
    ax.grid(alpha=.3)
    return ax


def plot_log_amplitude(models: Mapping[str, Sequence[LogAmplitude]], ax: Any = None) -> Any:
    """Draw the relative log amplitude next to the corner, above white noise, by depth, with 95 % intervals.

    Layers with maps so small that there is no such frequency are left out.
    """
    ax = _own(ax)
    for i, (label, layers) in enumerate(models.items()):
        layers = [layer for layer in layers if math.isfinite(layer.high)]
        if not layers:
            continue
        style = LINES[i % len(LINES)]
        depth = [layer.depth for layer in layers]
        ax.plot(depth, [layer.high for layer in layers], label=label, markersize=4, **style)
        _, low, high = zip(*((values[-1].item() for values in layer.interval()) for layer in layers), strict=True)
        ax.fill_between(depth, low, high, color=style['color'], alpha=.15)
    ax.set_xlabel('depth (first to last block)')
    ax.set_ylabel('Δ log amplitude above noise')
    ax.grid(alpha=.3)
    return ax


def plot_heatmap(points: Sequence[HeatmapPoint], ax: Any = None, *, vmax: float = 100.) -> Any:
    """Draw the error by frequency, zero frequency at the centre; opposite frequencies are the same perturbation.

    Args:
        points: Points of one amplitude.
        ax: Axes of matplotlib, by default new ones.
        vmax: Percent at the end of the colour scale, to share it.
    """
    ax = _own(ax)
    errors = {(s * point.v, s * point.u): point.error for point in points for s in (1, -1)}
    rows, columns = (sorted({key[i] for key in errors}) for i in (0, 1))
    # (-H/2, u) is (H/2, u) again, and may not have been evaluated as such
    grid = [[errors.get((v, u), errors.get((-v, u), math.nan)) for u in columns] for v in rows]
    step = columns[1] - columns[0] if len(columns) > 1 else 1
    edges = (columns[0] - step / 2, columns[-1] + step / 2, rows[0] - step / 2, rows[-1] + step / 2)
    ax.imshow(grid, origin='lower', extent=edges, vmin=0, vmax=vmax, cmap='viridis', interpolation='nearest')
    ax.set_xlabel('cycles over the width')
    ax.set_ylabel('cycles over the height')
    return ax


def plot_radial_error(
        models: Mapping[str, Sequence[HeatmapPoint]],
        ax: Any = None,
        *,
        chance: float | None = None,
) -> Any:
    """Draw the mean error by rounded radius, one line per label; `chance` is the error at chance in percent."""
    ax = _own(ax)
    for i, (label, points) in enumerate(models.items()):
        rows = radial_summary(points)
        ax.plot([row['radius'] for row in rows], [row['error'] for row in rows], label=label, markersize=4,
                **LINES[i % len(LINES)])
    if chance is not None:
        ax.axhline(chance, color='gray', linewidth=.8, linestyle=(0, (2, 2)), label='chance')
    ax.set_ylim(bottom=0)
    ax.set_xlabel('radius (cycles/image)')
    ax.set_ylabel('error (%)')
    ax.grid(alpha=.3)
    return ax


def plot_sensitivity(models: Mapping[str, Sensitivity], ax: Any = None) -> Any:
    """Draw each frequency's share of the energy of input gradients without their mean, with 95 % intervals."""
    ax = _own(ax)
    smallest = math.inf
    for i, (label, found) in enumerate(models.items()):
        style = LINES[i % len(LINES)]
        modes = modes_per_bin(*found.size)
        middle, low, high = (values[1:] / modes[1:] for values in found.interval())
        _log_line(ax, middle, label=label, **style)
        smallest = min([smallest, *middle[middle > 0].tolist()])
        ax.fill_between(range(1, len(middle) + 1), low.clamp(min=1e-30), high, color=style['color'], alpha=.15)
    ax.set_ylim(bottom=smallest / 3)  # a bound of 0 has no place on a logarithmic axis
    ax.set_xlabel('radius (cycles/image)')
    ax.set_ylabel('share of gradient energy per frequency')
    ax.grid(alpha=.3)
    return ax


def plot_image_spectrum(image: torch.Tensor, ax: Any = None, *, radii: Sequence[float] = ()) -> Any:
    """Draw the power per frequency of an image (C, H, W), the mean over its channels, and a line at each radius."""
    import numpy as np
    ax = _own(ax)
    power = (radial_power_spectrum(image.detach().float().cpu()).mean(0) / modes_per_bin(*image.shape[-2:]))[1:]
    power = torch.where(power > 1e-12 * power.max(), power, math.nan)  # rounding errors are no power
    ax.semilogy(range(1, len(power) + 1), power, color='black', linewidth=1.2)
    top, bottom = (x.item() for x in (power.nan_to_num(0.).max(), power.nan_to_num(math.inf).min()))
    if 0 < bottom < math.inf:  # two decades at least: a flat spectrum is to look flat, and ticks need room
        middle, half = (top * bottom) ** .5, max(10., 1.5 * (top / bottom) ** .5)
        ax.set_ylim(middle / half, middle * half)
        ax.set_yticks([], minor=True)
    ticks = [0, *(2 ** k for k in range(len(power).bit_length()))]
    ax.set_xscale('function', functions=(np.log1p, np.expm1))  # gives the small radii room
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(0, len(power))
    ax.set_xlabel('radius (cycles/image)', fontsize=9)
    for radius in radii:
        ax.axvline(radius, color='gray', linestyle='--', linewidth=.8)
        ax.text(radius, .99, f'{radius:g}', transform=ax.get_xaxis_transform(), fontsize=8, ha='right', va='top')
    ax.set_title('power per frequency', fontsize=10)
    ax.set_ylabel('mean square of pixels', fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=.3)
    return ax


def displayable(pixels: torch.Tensor, kind: str) -> tuple[Any, str]:
    """Pixels as matplotlib and PIL take them, 0…1, and a note for the title.

    Images without their mean are drawn around mid-grey, and stretched. Of other than one or three channels, the first
    ones are drawn.

    Args:
        pixels: Pixels (C, H, W), 0…1 for a raw picture.
        kind: Kind of the band.

    Returns:
        Array (H, W) or (H, W, 3), and the note.
    """
    pixels = pixels.detach().float().cpu()
    note = ''
    if kind in ('high', 'band-pass'):
        deviation = pixels - pixels.mean((-2, -1), keepdim=True)
        largest = deviation.abs().flatten().quantile(.995).item()
        factor = .5 / largest if largest > 1e-6 else 1.
        pixels = .5 + factor * deviation
        note = f' (contrast × {factor:.1f})'
    pixels = pixels.clamp(0, 1)
    return (pixels[0] if len(pixels) < 3 else pixels[:3].permute(1, 2, 0)).numpy(), note


def _own(ax: Any) -> Any:
    return require('matplotlib.pyplot', 'freq').subplots(layout='constrained')[1] if ax is None else ax


def _log_line(ax: Any, values: torch.Tensor, **style: Any) -> None:
    values = torch.where(values > 1e-12 * values.nan_to_num(0.).max(), values, math.nan)  # rounding errors are no power
    ax.semilogy(range(1, len(values) + 1), values, **{'markersize': 3, **style})
