"""Figures of the frequency view.

A function `plot_…` draws into one Axes, its own or a given one, and returns it, for notebooks and figures of papers. A
function `draw_…` arranges them in a Figure, which `save_figure` writes as PNG, PDF or SVG. Dashes and markers tell
lines apart, so that they can be read without colour.
"""
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing
from gmnet_timm.frequency.amplitude import LogAmplitude
from gmnet_timm.frequency.answers import ScanPoint
from gmnet_timm.frequency.bands import BANDS, Band
from gmnet_timm.frequency.extras import require_matplotlib
from gmnet_timm.frequency.heatmap import HeatmapPoint, radial_summary
from gmnet_timm.frequency.sensitivity import Sensitivity
from gmnet_timm.frequency.signals import SIGNAL_NAMES, LayerSpectrum
from gmnet_timm.frequency.split import bin_power, log_amplitude_spectrum, modes_per_bin, radial_power_spectrum

__all__ = [
    'Curves', 'LINES', 'band_title', 'displayable', 'draw_band_accuracy', 'draw_band_curves', 'draw_heatmaps',
    'draw_image_panel', 'draw_image_spectrum', 'draw_layers', 'draw_log_amplitudes', 'draw_maps', 'draw_scan',
    'draw_sensitivity', 'figure_svg', 'new_figure', 'plot_accuracy', 'plot_gain', 'plot_heatmap',
    'plot_image_spectrum', 'plot_log_amplitude', 'plot_radial_error', 'plot_scan', 'plot_sensitivity', 'plot_spectrum',
    'radius_axis', 'save_figure', 'with_legend',
]

# label -> (band, radius as text) -> points (x, percent, lower bound, upper bound)
Curves = Mapping[str, Mapping[tuple[str, str], Sequence[tuple[float, float, float, float]]]]

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
_KINDS: dict[str, dict[str, Any]] = {
    'low': dict(color='#0072b2', linestyle='-'), 'high': dict(color='#d55e00', linestyle='--'),
}
_MOST_PANELS = 40


# --- into one Axes ---------------------------------------------------------------------------------------------------


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
    if statistics is not None and statistics.predicted is not None:
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
    """Draw the relative log amplitude next to the corner, above white noise, by depth, with 95 % intervals."""
    ax = _own(ax)
    for i, (label, layers) in enumerate(models.items()):
        style = LINES[i % len(LINES)]
        depth = [layer.depth for layer in layers]
        ax.plot(depth, [layer.high for layer in layers], label=label, markersize=4, **style)
        low, high = zip(*((bound[-1].item() for bound in layer.interval()) for layer in layers), strict=True)
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


def plot_scan(points: Sequence[ScanPoint], largest: int, ax: Any = None) -> Any:
    """Draw the confidence in the answer to the whole image against the radius; where another is likelier, crosses.

    Args:
        points: From `scan_radii`.
        largest: Largest radius, for the axis.
        ax: Axes of matplotlib, by default new ones.
    """
    ax = _own(ax)
    answer = next(point.answer for point in points if point.kind == 'raw')
    for kind in ('low', 'high'):
        found = sorted((p for p in points if p.kind == kind), key=lambda point: point.radius or 0)
        style = _KINDS[kind]
        ax.plot([p.radius for p in found], [100 * p.kept for p in found], label=f'{kind}-pass', linewidth=1.4, **style)
        other = [p for p in found if p.answer != answer]
        ax.plot([p.radius for p in other], [100 * p.kept for p in other], linestyle='', marker='x', markersize=3.5,
                markeredgewidth=.8, color=style['color'])
    ax.plot([], [], linestyle='', marker='x', markersize=3.5, color='black', label='another class is likelier')
    radius_axis(ax, largest)
    ax.set_ylim(-4, 104)
    ax.set_ylabel('confidence (%)', fontsize=9)
    ax.grid(alpha=.3)
    return ax


def plot_image_spectrum(image: torch.Tensor, ax: Any = None, *, radii: Sequence[float] = ()) -> Any:
    """Draw the power per frequency of an image (C, H, W), the mean over its channels, and a line at each radius."""
    ax = _own(ax)
    power = (radial_power_spectrum(image.detach().float().cpu()).mean(0) / modes_per_bin(*image.shape[-2:]))[1:]
    power = torch.where(power > 1e-12 * power.max(), power, math.nan)  # rounding errors are no power
    ax.semilogy(range(1, len(power) + 1), power, color='black', linewidth=1.2)
    top, bottom = (x.item() for x in (power.nan_to_num(0.).max(), power.nan_to_num(math.inf).min()))
    if 0 < bottom < math.inf:  # two decades at least: a flat spectrum is to look flat, and ticks need room
        middle, half = (top * bottom) ** .5, max(10., 1.5 * (top / bottom) ** .5)
        ax.set_ylim(middle / half, middle * half)
        ax.set_yticks([], minor=True)
    radius_axis(ax, len(power))
    for radius in radii:
        ax.axvline(radius, color='gray', linestyle='--', linewidth=.8)
        ax.text(radius, .99, f'{radius:g}', transform=ax.get_xaxis_transform(), fontsize=8, ha='right', va='top')
    ax.set_title('power per frequency', fontsize=10)
    ax.set_ylabel('mean square of pixels', fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=.3)
    return ax


def radius_axis(ax: Any, largest: int) -> None:
    """A horizontal axis of radii from 0 on that gives the small ones room, logarithmic beyond the first ones."""
    import numpy as np
    ax.set_xscale('function', functions=(np.log1p, np.expm1))
    ticks = [0, *(2 ** k for k in range(int(math.log2(max(1, largest))) + 1))]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(0, largest)
    ax.set_xlabel('radius (cycles/image)', fontsize=9)
    ax.tick_params(labelsize=8)


def band_title(band: Band) -> str:
    """What frequencies a picture has, for its title."""
    return band.kind if band.radius is None else f'{band.kind}, r = {str(band).partition(" ")[2]}'


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


# --- figures ---------------------------------------------------------------------------------------------------------


def draw_band_curves(curves: Curves, title: str = '', chance: float | None = None) -> Any:
    """Accuracies against epochs: a column each for raw and the kinds of bands, a row per radius, a line per model."""
    keys = list(dict.fromkeys(key for bands in curves.values() for key in bands))
    kinds = [kind for kind in ('raw', 'low', 'high', 'band-pass', 'band-stop') if any(key[0] == kind for key in keys)]
    radii = {kind: [radius for band, radius in keys if band == kind] for kind in kinds}
    figure, axes = new_figure(max(map(len, radii.values())), len(kinds), 3.6, 2.9, sharex=True, sharey=True)
    for column, kind in enumerate(kinds):
        for row, axis in enumerate(axes[:, column]):
            if row >= len(radii[kind]):
                axis.axis('off')
                continue
            radius = radii[kind][row]
            lines = {label: bands.get((kind, radius), []) for label, bands in curves.items()}
            plot_accuracy(lines, axis, chance=chance)
            axis.set_title('raw' if kind == 'raw' else f'{kind}, r = {radius} cycles/image', fontsize=10)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_xlabel('epoch' if row + 1 == len(radii[kind]) else '')
            axis.tick_params(labelbottom=row + 1 == len(radii[kind]))
    for row in axes:
        outer = next(axis for axis in row if axis.axison)
        outer.set_ylabel('top-1 (%)')
        outer.tick_params(labelleft=True)
    return with_legend(figure, title, axes[0][0])


def draw_band_accuracy(curves: Curves, title: str = '', chance: float | None = None) -> Any:
    """Accuracies against the radius: a panel per kind of band, a line per model, and its accuracy on raw images.

    Args:
        curves: Points (radius, percent, lower bound, upper bound) by label and (band, ''); of ('raw', '') the first one
            is used.
        title: Title of the figure.
        chance: Accuracy at chance in percent.
    """
    kinds = list(dict.fromkeys(kind for bands in curves.values() for kind, _ in bands if kind != 'raw'))
    figure, axes = new_figure(1, max(1, len(kinds)), 4.2, 3.2, sharey=True)
    for axis, kind in zip(axes[0], kinds):
        plot_accuracy({label: bands.get((kind, ''), []) for label, bands in curves.items()}, axis, chance=chance)
        for i, bands in enumerate(curves.values()):
            axis.axhline(bands['raw', ''][0][1], linewidth=.9, alpha=.6, **{
                key: value for key, value in LINES[i % len(LINES)].items() if key in ('color', 'linestyle')})
        axis.set_title(f'{kind}; horizontal lines: raw images', fontsize=10)
        axis.set_xlabel('radius (cycles/image)')
        radii = sorted({point[0] for bands in curves.values() for point in bands.get((kind, ''), [])})
        if len(radii) <= 12:
            axis.set_xticks(radii, [f'{radius:g}' for radius in radii], fontsize=8)
    axes[0][0].set_ylabel('top-1 (%)')
    tops = [max(y for y in point[1:] if not math.isnan(y)) for bands in curves.values()
            for points in bands.values() for point in points]
    axes[0][0].set_ylim(0, 1.05 * max(tops))  # the lines of raw images lie above what the panels hold
    return with_legend(figure, title, axes[0][0])


def draw_layers(layers: Sequence[LayerSpectrum], title: str = '', *, gain: bool = False) -> Any:
    """Spectra, or gains, of layers: one panel each, with shared vertical axes. The title says what is left out and why.

    Raises:
        UserError: No layer can be drawn.
    """
    drawn = [layer for layer in layers if layer.after is not None or layer.before is not None]
    small = [layer for layer in drawn if max(s.power.shape[1] for s in layer.signals.values()) <= 2]
    drawn = [layer for layer in drawn if layer not in small]
    without = [layer for layer in drawn if gain and layer.gain() is None]
    drawn = [layer for layer in drawn if layer not in without]
    notes = []
    if small:
        notes.append(f'{len(small)} with maps of a few pixels')
    if without:
        notes.append(f'{len(without)} that change resolution or have maps on one side only')
    if len(drawn) > _MOST_PANELS:
        notes.append(f'{len(drawn) - _MOST_PANELS} beyond the first {_MOST_PANELS}')
        drawn = drawn[:_MOST_PANELS]
    if not drawn:
        raise UserError(f'There is nothing to draw: left out are {"; ".join(notes) or "all"}. Use larger images.')
    columns = min(5 if len(drawn) > 8 else 4, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure, axes = new_figure(rows, columns, 3.4 if len(drawn) < 3 else 2.7, 2.4, sharey=True)
    flat = list(axes.flat)
    for axis, layer in zip(flat, drawn, strict=False):
        (plot_gain if gain else plot_spectrum)(layer, axis)
        sizes = list(dict.fromkeys(f'{h}×{w}' for h, w in (signal.size for signal in layer.signals.values())))
        axis.set_title(f'{layer.name or "model"} ({" → ".join(sizes)})', fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(which='both', labelsize=8)
    for axis in flat[len(drawn):]:
        axis.axis('off')
    for row in axes:
        row[0].set_ylabel('power gain' if gain else 'share of energy\nper frequency', fontsize=9)
    for i in range(max(0, len(drawn) - columns), len(drawn)):
        flat[i].set_xlabel('cycles per image', fontsize=9)
    left_out = f'\nleft out: {"; ".join(notes)}' if notes else ''
    return with_legend(figure, title + left_out, *flat[:len(drawn)])


def draw_log_amplitudes(models: Mapping[str, Sequence[LogAmplitude]], title: str = '') -> Any:
    """Relative log amplitude: by depth, and along the half-diagonal for the first and the last block of each model."""
    figure, axes = new_figure(1, 2, 4.4, 3.4)
    plot_log_amplitude(models, axes[0][0])
    axes[0][0].set_title('next to the corner of the spectrum, by depth', fontsize=10)
    for i, layers in enumerate(models.values()):
        for layer, alpha in ((layers[0], .4), (layers[-1], 1.)):
            style = {key: value for key, value in LINES[i % len(LINES)].items() if key != 'marker'}
            points = 2 * torch.arange(len(layer.curve)) / min(layer.size)
            axes[0][1].plot(points, layer.curve, alpha=alpha, **style)
    axes[0][1].set_title('along the half-diagonal; pale: first block, full: last', fontsize=10)
    axes[0][1].set_xlabel('frequency (0: mean, 1: corner)')
    axes[0][1].set_ylabel('Δ log amplitude above noise')
    axes[0][1].grid(alpha=.3)
    return with_legend(figure, title, axes[0][0])


def draw_heatmaps(
        models: Mapping[str, Mapping[float, Sequence[HeatmapPoint]]],
        title: str = '',
        chance: float | None = None,
) -> Any:
    """Heat maps with one colour scale, and the mean by radius.

    At one amplitude, a panel per model and one for their means by radius. At several, a row per model and a column per
    amplitude, and in each row its means by radius.

    Args:
        models: Points by label and amplitude.
        title: Title of the figure.
        chance: Error at chance in percent.
    """
    amplitudes = list(dict.fromkeys(a for by_amplitude in models.values() for a in by_amplitude))
    top = max(point.error for found in models.values() for points in found.values() for point in points)
    if len(amplitudes) == 1:
        columns = min(3, len(models) + 1)
        figure, axes = new_figure(math.ceil((len(models) + 1) / columns), columns, 3.6, 3.1)
        maps, radial = list(axes.flat[:len(models)]), [axes.flat[len(models)]]
        for axis in axes.flat[len(models) + 1:]:
            axis.axis('off')
        by_panel = [{label: found[amplitudes[0]] for label, found in models.items()}]
        names = [f'amplitude {amplitudes[0]:g}, mean by radius']
    else:
        figure, axes = new_figure(len(models), len(amplitudes) + 1, 3.5, 3.1)
        maps, radial = list(axes[:, :-1].flat), list(axes[:, -1])
        by_panel = [{f'amplitude {a:g}': points for a, points in found.items()} for found in models.values()]
        names = [f'{label}\nmean by radius' for label in models]
    for axis, (label, amplitude) in zip(maps, itertools.product(models, amplitudes), strict=True):
        plot_heatmap(models[label].get(amplitude, []), axis, vmax=max(top, 1.))
        axis.set_title(label if len(amplitudes) == 1 else f'{label}\namplitude {amplitude:g}', fontsize=10)
    for axis, lines, name in zip(radial, by_panel, names, strict=True):
        plot_radial_error(lines, axis, chance=chance)
        axis.set_ylim(0, 1.05 * max(top, chance or 0, 1.))
        axis.set_title(name, fontsize=10)
    figure.colorbar(maps[0].images[-1], ax=maps, label='error (%)', shrink=.8)
    return with_legend(figure, title, radial[0])


def draw_sensitivity(models: Mapping[str, Sensitivity], title: str = '') -> Any:
    """Spectra of input gradients of models in one panel."""
    figure, axes = new_figure(1, 1, 6.4, 3.8)
    return with_legend(figure, title, plot_sensitivity(models, axes[0][0]))


def draw_image_panel(
        parts: Sequence[tuple[Band, torch.Tensor]],
        answers: Sequence[Sequence[tuple[str, float]]],
        title: str = '',
) -> Any:
    """A picture and its spectrum, a row for each kind of band beside them, and what a model says of each.

    Args:
        parts: Bands and their pixels (C, H, W), 0…1 for the raw picture, raw first.
        answers: For each image class and confidence (0…1), most confident first.
        title: Title of the figure.
    """
    kinds = [kind for kind in BANDS if any(band.kind == kind for band, _ in parts)]
    columns = {kind: [band for band, _ in parts if band.kind == kind] for kind in kinds}
    rows = max(2, len(kinds))
    figure, axes = new_figure(rows, 1 + max(map(len, columns.values()), default=0), 2.7, 3.1 + .06 * len(answers[0]))
    for (band, pixels), lines in zip(parts, answers, strict=True):
        axis = axes[0][0] if band.radius is None else axes[kinds.index(band.kind)][columns[band.kind].index(band) + 1]
        shown, note = displayable(pixels, band.kind)
        axis.imshow(shown, cmap='gray', vmin=0, vmax=1)
        axis.set_title(band_title(band) + note, fontsize=10)
        axis.set_xlabel('\n'.join(f'{name} {100 * confidence:.0f} %' for name, confidence in lines), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    plot_image_spectrum(parts[0][1], axes[1][0], radii=sorted({band.radius for band, _ in parts if band.radius}))
    for axis in axes.flat:
        if not axis.has_data():
            axis.axis('off')
    figure.suptitle(title, fontsize=11)
    return figure


def draw_scan(points: Mapping[str, Sequence[ScanPoint]], largest: int, title: str = '') -> Any:
    """Confidence in the answer to the whole image against the radius, a panel per model.

    Args:
        points: What `scan_radii` has found so far, by label.
        largest: Largest radius, for the axis.
        title: Title of the figure.
    """
    figure, axes = new_figure(len(points), 1, 5., 2.3)
    for axis, (label, found) in zip(axes[:, 0], points.items(), strict=True):
        plot_scan(found, largest, axis)
        axis.set_title(label, fontsize=10)
    return with_legend(figure, title, *axes[:, 0])


def draw_image_spectrum(image: torch.Tensor, title: str = '') -> Any:
    """The spectrum of an image (C, H, W) in a figure of its own."""
    figure, axes = new_figure(1, 1, 5., 2.6)
    plot_image_spectrum(image, axes[0][0])
    figure.suptitle(title, fontsize=11)
    return figure


def draw_maps(maps: Mapping[str, torch.Tensor], channels: Sequence[int], title: str = '') -> Any:
    """Maps of a layer, a row per signal with one colour scale, and below it their log-amplitude spectra.

    Args:
        maps: Maps (C, H, W) by name of the signal.
        channels: Which ones to draw.
        title: Title of the figure.
    """
    figure, axes = new_figure(2 * len(maps), len(channels), 1.15, 1.25)
    for i, (name, signal) in enumerate(maps.items()):
        chosen = [channel for channel in channels if channel < len(signal)]
        shown = [signal[channel].float().cpu() for channel in chosen]
        rows = (
            (axes[2 * i], shown, 'viridis', SIGNAL_NAMES[name]),
            (axes[2 * i + 1], [log_amplitude_spectrum(x) for x in shown], 'magma', 'log amplitude'),
        )
        for row, pictures, colours, label in rows:
            low = min(x.nan_to_num(math.inf).min().item() for x in pictures)
            high = max(x.nan_to_num(-math.inf).max().item() for x in pictures)
            for axis, channel, x in zip(row, chosen, pictures, strict=False):
                image = axis.imshow(x, vmin=low, vmax=high, cmap=colours, interpolation='nearest')
                axis.set_title(f'channel {channel}' if colours == 'viridis' else '', fontsize=8)
            for axis in row:
                axis.set_xticks([])
                axis.set_yticks([])
            row[0].set_ylabel(label, fontsize=8)
            figure.colorbar(image, ax=list(row), pad=.01).ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def save_figure(figure: Any, path: str | Path, force: bool = True) -> None:
    """Write a figure as PNG, PDF or SVG, by the suffix of the path; fonts stay text in PDF and SVG.

    Raises:
        UserError: There is no such format, or the file exists and `force` is not set.
    """
    import matplotlib
    try:
        with replacing(path, force=force) as temporary, \
                matplotlib.rc_context({'pdf.fonttype': 42, 'svg.fonttype': 'none'}):
            figure.savefig(temporary, dpi=130, bbox_inches='tight')
    except ValueError as e:  # matplotlib knows no such format
        raise UserError(f'Cannot write {path}: {e}') from e


def figure_svg(figure: Any, crop: bool = True) -> str:
    """A figure as the text of an SVG file, with fonts as text; `crop` takes off margins and adds what sticks out."""
    import matplotlib
    text = io.StringIO()
    with matplotlib.rc_context({'svg.fonttype': 'none'}):
        figure.savefig(text, format='svg', bbox_inches='tight' if crop else None)
    return text.getvalue()


def _own(ax: Any) -> Any:
    if ax is not None:
        return ax
    require_matplotlib()
    from matplotlib import pyplot
    return pyplot.subplots(layout='constrained')[1]


def _log_line(ax: Any, values: torch.Tensor, **style: Any) -> None:
    values = torch.where(values > 1e-12 * values.nan_to_num(0.).max(), values, math.nan)  # rounding errors are no power
    ax.semilogy(range(1, len(values) + 1), values, **{'markersize': 3, **style})


def new_figure(rows: int, columns: int, width: float, height: float, **kwargs: Any):
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(max(5., width * columns), height * rows + .9), layout='constrained')
    FigureCanvasAgg(figure)  # no window, whatever the environment
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def with_legend(figure: Any, title: str, *axes: Any) -> Any:
    """One legend below all panels, with the lines of all given ones, in as many columns as fit."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    characters = max(map(len, found), default=1) + 8
    columns = max(1, min(len(found), int(figure.get_size_inches()[0] * 13 / characters)))
    figure.legend(
        list(found.values()), list(found), loc='outside lower center', ncols=columns, handlelength=4, frameon=False,
        fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure
