"""Figures of the frequency view.

A function `plot_…` draws into one Axes, its own or a given one, and returns it, for notebooks and figures of papers. A
function `draw_…` arranges them in a Figure, which `save_figure` writes as PNG, PDF or SVG. Dashes and markers tell
lines apart, so that they can be read without colour.
"""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing
from gmnet_timm.frequency.amplitude import LogAmplitude
from gmnet_timm.frequency.extras import require_matplotlib
from gmnet_timm.frequency.heatmap import HeatmapPoint, radial_summary
from gmnet_timm.frequency.learn_tasks import IDEAL
from gmnet_timm.frequency.sensitivity import Sensitivity
from gmnet_timm.frequency.spectra import LayerSpectrum
from gmnet_timm.frequency.split import modes_per_bin, radial_power_spectrum
from gmnet_timm.frequency.statistics import mean_interval
from gmnet_timm.frequency.theory import MapPrediction
from gmnet_timm.frequency.variants import Variant

__all__ = [
    'Curves', 'draw_band_accuracy', 'draw_band_curves', 'draw_heatmaps', 'draw_image_panel', 'draw_layers',
    'draw_learning', 'draw_log_amplitudes', 'draw_sensitivity', 'draw_theory', 'draw_theory_of_gates', 'plot_accuracy',
    'plot_gain', 'plot_heatmap', 'plot_log_amplitude', 'plot_radial_error', 'plot_sensitivity', 'plot_spectrum',
    'save_figure',
]

# label -> (band, radius as text) -> points (x, percent, lower bound, upper bound)
Curves = Mapping[str, Mapping[tuple[str, str], Sequence[tuple[float, float, float, float]]]]

_LINES: list[dict[str, Any]] = [
    dict(linestyle='-', marker='o', color='black'),
    dict(linestyle='--', marker='s', color='#0072b2', markerfacecolor='white'),
    dict(linestyle='-.', marker='^', color='#d55e00'),
    dict(linestyle=':', marker='D', color='#777777', markerfacecolor='white'),
    dict(linestyle=(0, (5, 1)), marker='v', color='#009e73'),
    dict(linestyle=(0, (1, 1)), marker='X', color='#aa4499'),
    dict(linestyle=(0, (4, 1, 1, 1)), marker='P', color='#e69f00', markerfacecolor='white'),
]
_SIGNALS = {  # style and label of each signal of a layer
    'input': (1, 'input'), 'output': (0, 'output'), 'gate': (2, 'gate operand'), 'value': (1, 'value operand'),
    'product': (0, 'product'),
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
    spread = min((b[0] - a[0] for points in lines.values() for a, b in zip(points, points[1:])), default=1.)
    for i, (label, points) in enumerate(lines.items()):
        if not points:
            continue
        x, middle, low, high = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
        x = x + .1 * spread * (i - (len(lines) - 1) / 2)  # so that bars do not hide each other
        errors = torch.stack([middle - low, high - middle]).nan_to_num(0.).clamp(min=0)
        ax.errorbar(
            x, middle, yerr=errors, label=label, markersize=4.5, linewidth=1.3, elinewidth=.8, capsize=1.5,
            **_LINES[i % len(_LINES)])
    if chance is not None:
        ax.axhline(chance, color='gray', linewidth=.8, linestyle=(0, (2, 2)), label='chance')
    ax.set_ylim(bottom=0)
    ax.grid(alpha=.3)
    return ax


def plot_spectrum(layer: LayerSpectrum, ax: Any = None) -> Any:
    """Draw the mean power per frequency of each signal of a layer relative to its energy without the mean.

    A dotted line is what theory predicts for the product of a gate. A grey line marks half of the Nyquist radius, where
    the high frequencies of the ratios begin.
    """
    ax = _own(ax)
    for name, signal in layer.signals.items():
        style, label = _SIGNALS[name]
        energy = signal.power.mean(0)[1:].sum()
        values = signal.per_mode[1:] / energy
        _log_line(ax, values, label=label, **_LINES[style])
    statistics = layer.statistics
    if statistics is not None and statistics.predicted is not None:
        size = layer.signals['product'].size
        values = (statistics.predicted / modes_per_bin(*size))[1:] / statistics.predicted[1:].sum()
        _log_line(ax, values, label='predicted product', linestyle=':', color='#aa4499', linewidth=1.8)
    after = layer.after
    if after is not None:
        ax.axvline(after.cutoff + .5, color='gray', linewidth=.8)
        before = f'{layer.before.high_low_ratio:.2g} → ' if layer.before is not None else ''
        ax.text(.97, .95, f'high/low {before}{after.high_low_ratio:.2g}', transform=ax.transAxes, ha='right', va='top',
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
    ax.semilogy(radii, gain, label='after / before', markersize=3, **_LINES[0])
    ax.fill_between(radii, low, high, color='gray', alpha=.4, label='95 % interval over images')
    ax.axhline(1, color='gray', linewidth=.8, label='gain 1')
    from matplotlib.ticker import LogFormatter
    ax.yaxis.set_major_formatter('{x:g}')
    ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, .4)))
    ax.grid(alpha=.3)
    return ax


def plot_log_amplitude(models: Mapping[str, Sequence[LogAmplitude]], ax: Any = None) -> Any:
    """Draw the relative log amplitude at the corner of the spectrum by depth, one line per model."""
    ax = _own(ax)
    for i, (label, layers) in enumerate(models.items()):
        ax.plot([layer.depth for layer in layers], [layer.high for layer in layers], label=label, markersize=4,
                **_LINES[i % len(_LINES)])
    ax.set_xlabel('depth (first to last block)')
    ax.set_ylabel('Δ log amplitude')
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
                **_LINES[i % len(_LINES)])
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
    for i, (label, found) in enumerate(models.items()):
        style = _LINES[i % len(_LINES)]
        modes = modes_per_bin(*found.size)
        middle, low, high = (values[1:] / modes[1:] for values in found.interval())
        _log_line(ax, middle, label=label, **style)
        ax.fill_between(range(1, len(middle) + 1), low.clamp(min=1e-12), high, color=style['color'], alpha=.15)
    ax.set_xlabel('radius (cycles/image)')
    ax.set_ylabel('share of gradient energy per frequency')
    ax.grid(alpha=.3)
    return ax


# --- figures ---------------------------------------------------------------------------------------------------------


def draw_band_curves(curves: Curves, title: str = '', chance: float | None = None) -> Any:
    """Accuracies against epochs: a column each for raw and the kinds of bands, a row per radius, a line per model."""
    keys = list(dict.fromkeys(key for bands in curves.values() for key in bands))
    kinds = [kind for kind in ('raw', 'low', 'high', 'band-pass', 'band-stop') if any(key[0] == kind for key in keys)]
    radii = {kind: [radius for band, radius in keys if band == kind] for kind in kinds}
    figure, axes = _figure(max(map(len, radii.values())), len(kinds), 3.6, 2.9, sharex=True, sharey=True)
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
            axis.set_xlabel('epoch')
            axis.set_ylabel('top-1 (%)')
            axis.tick_params(labelbottom=True, labelleft=True)
    return _with_legend(figure, title, axes[0][0])


def draw_band_accuracy(curves: Curves, title: str = '', chance: float | None = None) -> Any:
    """Accuracies against the radius: a panel per kind of band, a line per model, and its accuracy on raw images.

    Args:
        curves: Points (radius, percent, lower bound, upper bound) by label and (band, ''); of ('raw', '') the first one
            is used.
        title: Title of the figure.
        chance: Accuracy at chance in percent.
    """
    kinds = [kind for kind in ('low', 'high', 'band-pass', 'band-stop')
             if any((kind, '') in bands for bands in curves.values())]
    figure, axes = _figure(1, max(1, len(kinds)), 4.2, 3.2, sharex=True, sharey=True)
    for axis, kind in zip(axes[0], kinds):
        plot_accuracy({label: bands.get((kind, ''), []) for label, bands in curves.items()}, axis, chance=chance)
        for i, bands in enumerate(curves.values()):
            axis.axhline(bands['raw', ''][0][1], linewidth=.9, alpha=.6, **{
                key: value for key, value in _LINES[i % len(_LINES)].items() if key in ('color', 'linestyle')})
        axis.set_title(f'{kind}; horizontal lines: raw images', fontsize=10)
        axis.set_xlabel('radius (cycles/image)')
        axis.set_ylabel('top-1 (%)')
        axis.tick_params(labelleft=True)
    return _with_legend(figure, title, axes[0][0])


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
    figure, axes = _figure(rows, columns, 3.4 if len(drawn) < 3 else 2.7, 2.4, sharey=True)
    flat = list(axes.flat)
    for axis, layer in zip(flat, drawn, strict=False):
        (plot_gain if gain else plot_spectrum)(layer, axis)
        sizes = list(dict.fromkeys(f'{h}×{w}' for h, w in (signal.size for signal in layer.signals.values())))
        axis.set_title(f'{layer.name or "model"} ({" → ".join(sizes)})', fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
    for axis in flat[len(drawn):]:
        axis.axis('off')
    for row in axes:
        row[0].set_ylabel('power gain' if gain else 'share of energy\nper frequency', fontsize=9)
    for i in range(max(0, len(drawn) - columns), len(drawn)):
        flat[i].set_xlabel('cycles per image', fontsize=9)
    left_out = f'\nleft out: {"; ".join(notes)}' if notes else ''
    return _with_legend(figure, title + left_out, *flat[:len(drawn)])


def draw_log_amplitudes(models: Mapping[str, Sequence[LogAmplitude]], title: str = '') -> Any:
    """Relative log amplitude: by depth, and along the half-diagonal for the first and the last block of each model."""
    figure, axes = _figure(1, 2, 4.4, 3.4)
    plot_log_amplitude(models, axes[0][0])
    axes[0][0].set_title('at the corner of the spectrum, by depth', fontsize=10)
    for i, layers in enumerate(models.values()):
        for layer, alpha in ((layers[0], .4), (layers[-1], 1.)):
            style = {key: value for key, value in _LINES[i % len(_LINES)].items() if key != 'marker'}
            points = torch.linspace(0, 1, len(layer.curve))
            axes[0][1].plot(points, layer.curve, alpha=alpha, **style)
    axes[0][1].set_title('along the half-diagonal; pale: first block, full: last', fontsize=10)
    axes[0][1].set_xlabel('frequency (0: mean, 1: corner)')
    axes[0][1].set_ylabel('Δ log amplitude')
    axes[0][1].grid(alpha=.3)
    return _with_legend(figure, title, axes[0][0])


def draw_heatmaps(
        models: Mapping[str, Mapping[float, Sequence[HeatmapPoint]]],
        title: str = '',
        chance: float | None = None,
) -> Any:
    """Heat maps, a row per model and a column per amplitude with one colour scale, and their radial summaries."""
    amplitudes = list(dict.fromkeys(a for by_amplitude in models.values() for a in by_amplitude))
    figure, axes = _figure(len(models), len(amplitudes) + 1, 3.5, 3.1)
    top = max(point.error for found in models.values() for points in found.values() for point in points)
    for row, (label, found) in zip(axes, models.items()):
        for axis, amplitude in zip(row, amplitudes):
            plot_heatmap(found.get(amplitude, []), axis, vmax=max(top, 1.))
            axis.set_title(f'{label}, amplitude {amplitude:g}', fontsize=10)
        plot_radial_error({f'amplitude {a:g}': points for a, points in found.items()}, row[-1], chance=chance)
        row[-1].set_ylim(0, 1.05 * max(top, chance or 0, 1.))
        row[-1].set_title(f'{label}, mean by radius', fontsize=10)
    figure.colorbar(axes[0][0].images[-1], ax=[axis for row in axes for axis in row[:-1]], label='error (%)', shrink=.8)
    return _with_legend(figure, title, axes[0][-1])


def draw_sensitivity(models: Mapping[str, Sensitivity], title: str = '') -> Any:
    """Spectra of input gradients of models in one panel."""
    figure, axes = _figure(1, 1, 6.4, 3.8)
    return _with_legend(figure, title, plot_sensitivity(models, axes[0][0]))


def draw_theory(maps: Sequence[MapPrediction]) -> Any:
    """High/low of Gaussian maps after each function against their scale, and its spectrum at the scale nearest 1.4."""
    figure, axes = _figure(1, 2, 4.6, 3.6)
    scales = sorted({prediction.scale for prediction in maps})
    near = min(scales, key=lambda scale: abs(math.log(scale / 1.4)))
    before = maps[0].input
    bins = slice(1, before.size[0] // 2 + 1)
    for i, name in enumerate(dict.fromkeys(prediction.function for prediction in maps)):
        style, label = {'markersize': 4, **_LINES[i % len(_LINES)]}, Variant(name).label
        found = sorted((p for p in maps if p.function == name), key=lambda p: p.scale)
        axes[0][0].semilogx([p.scale for p in found], [p.output.high_low_ratio for p in found], label=label, **style)
        after = next(p.output for p in found if p.scale == near)
        share, input_share = (x.power[0, bins] / x.power[0, 1:].sum() for x in (after, before))
        axes[0][1].plot(range(1, len(share) + 1), share / input_share, markevery=(i, 7), **style)
    axes[0][0].axhline(before.high_low_ratio, color='gray', linewidth=.8)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].set_title('energy beyond half of Nyquist over the rest', fontsize=10)
    axes[0][0].set_xlabel('standard deviation of the map; grey: ratio of the map')
    axes[0][0].set_ylabel('high/low')
    axes[0][1].axhline(1, color='gray', linewidth=.8)
    axes[0][1].set_title(f'spectra at standard deviation {near:g}', fontsize=10)
    axes[0][1].set_xlabel('radius (cycles/map)')
    axes[0][1].set_ylabel('share of energy, after over before')
    for axis in axes[0]:
        axis.grid(alpha=.3)
    return _with_legend(figure, 'Gaussian maps of {}×{} in theory'.format(*before.size), axes[0][0])


def draw_theory_of_gates(rows: Sequence[Mapping[str, Any]], title: str = '') -> Any:
    """High/low of the input and the product of each gate as measured, and of the product in theory."""
    figure, axes = _figure(1, 1, max(6.4, .45 * len(rows)), 4.)
    axis = axes[0][0]
    lines = {'value_high_low': 'input', 'product_high_low': 'product', 'predicted_high_low': 'product in theory'}
    for i, (key, label) in enumerate(lines.items()):
        axis.plot([row[key] for row in rows], label=label, markersize=5, **_LINES[i])
    functions = [key for key in rows[0] if key.startswith('predicted_') and key not in lines]
    for key in functions:
        label = Variant(key.removeprefix('predicted_')).label
        axis.plot([row[key] for row in rows], label=f'{label} in theory', marker='_', linestyle='', markersize=9)
    axis.set_xticks(range(len(rows)), [f'{row["layer"]}\n{row["size"]}' for row in rows], rotation=90, fontsize=7)
    axis.set_ylabel('high/low')
    axis.set_ylim(bottom=0)
    axis.grid(alpha=.3)
    return _with_legend(figure, title, axis)


def draw_learning(runs: Sequence[Mapping[str, Any]]) -> Any:
    """What each variant learned by step: a panel each, a line per band with Student's 95 % interval over seeds."""
    regression = runs[0]['task'] == 'regression'
    columns = min(5, len(runs))
    figure, axes = _figure(math.ceil(len(runs) / columns), columns, 2.7, 2.4, sharex=True, sharey=True)
    from matplotlib import colormaps
    for axis, run in zip(axes.flat, runs):
        for i, band in enumerate(run['bands']):
            points = [mean_interval([curve[m][i] for curve in run['values']]) for m in range(len(run['steps']))]
            mean, low, high = (torch.tensor(values) for values in zip(*points))
            colour = colormaps['viridis'](.95 * i / max(1, len(run['bands']) - 1))
            label = f'{band} cycle{"" if band == "1" else "s"}'
            axis.plot(run['steps'], mean, color=colour, linewidth=1.2, label=label)
            axis.fill_between(run['steps'], low, high, color=colour, alpha=.15, linewidth=0)
        axis.set_title(f'{Variant(run["variant"]).label}, lr {run["learning_rate"]:g}', fontsize=9)
        axis.grid(alpha=.3)
        axis.tick_params(labelsize=8)
        if regression:
            axis.set_xscale('symlog', linthresh=10)
            axis.set_ylim(0, 1.2)
        else:
            axis.axhline(IDEAL, color='gray', linewidth=.8, linestyle=(0, (2, 2)), label='best observer')
            axis.set_ylim(.4, 1)
    for axis in list(axes.flat)[len(runs):]:
        axis.axis('off')
    for row in axes:
        row[0].set_ylabel('relative error' if regression else 'accuracy', fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel('step', fontsize=9)
    seeds = len(runs[0]['values'])
    title = f'{runs[0]["task"]}, mean of {seeds} seed{"" if seeds == 1 else "s"} and its 95 % interval'
    return _with_legend(figure, title, axes[0][0])


def draw_image_panel(
        parts: Sequence[tuple[str, float | None, torch.Tensor]],
        answers: Sequence[Sequence[tuple[str, float]]],
        title: str = '',
) -> Any:
    """A picture, its low-pass images above its high-pass images, and what a model says of each.

    Args:
        parts: Band, radius and pixels (C, H, W) of each image, 0…1 for the raw picture, raw first.
        answers: For each image class and confidence (0…1), most confident first.
        title: Title of the figure.
    """
    radii = [radius for band, radius, _ in parts if band == 'low']
    figure, axes = _figure(2, 1 + len(radii), 2.7, 3.3)
    for (band, radius, pixels), lines in zip(parts, answers, strict=True):
        axis = axes[1 if band == 'high' else 0][0 if radius is None else radii.index(radius) + 1]
        shown, note = _displayable(pixels, band)
        axis.imshow(shown, cmap='gray', vmin=0, vmax=1)
        axis.set_title('raw' if radius is None else f'{band}, r = {radius:g}{note}', fontsize=10)
        axis.set_xlabel('\n'.join(f'{name} {100 * confidence:.0f} %' for name, confidence in lines), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    _draw_spectrum(axes[1][0], parts[0][2], radii)
    figure.suptitle(title, fontsize=11)
    return figure


def save_figure(figure: Any, path: Path, force: bool = True) -> None:
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


def _own(ax: Any) -> Any:
    if ax is not None:
        return ax
    require_matplotlib()
    from matplotlib import pyplot
    return pyplot.subplots(layout='constrained')[1]


def _log_line(ax: Any, values: torch.Tensor, **style: Any) -> None:
    values = torch.where(values > 1e-12 * values.nan_to_num(0.).max(), values, math.nan)  # rounding errors are no power
    ax.semilogy(range(1, len(values) + 1), values, **{'markersize': 3, **style})


def _displayable(pixels: torch.Tensor, band: str) -> tuple[Any, str]:
    """Pixels as matplotlib takes them. High-pass images have no mean: they are drawn around mid-grey, and stretched."""
    pixels = pixels.detach().float().cpu()
    note = ''
    if band == 'high':
        deviation = pixels - pixels.mean((-2, -1), keepdim=True)
        largest = deviation.abs().flatten().quantile(.995).item()
        factor = .5 / largest if largest > 0 else 1.
        pixels = .5 + factor * deviation
        note = f' (contrast × {factor:.1f})'
    pixels = pixels.clamp(0, 1)
    return (pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy(), note


def _draw_spectrum(axis: Any, image: torch.Tensor, radii: Sequence[float | None]) -> None:
    power = radial_power_spectrum(image.detach().float().cpu()).mean(0) / modes_per_bin(*image.shape[-2:])
    axis.loglog(range(1, len(power)), power[1:], color='black')
    for radius in radii:
        if radius:
            axis.axvline(radius, color='gray', linestyle='--', linewidth=.8)
            axis.text(
                radius, .99, f'{radius:g}', transform=axis.get_xaxis_transform(), fontsize=8, ha='right', va='top')
    axis.set_title('power per frequency', fontsize=10)
    axis.set_xlabel('radius (cycles/image)', fontsize=9)
    axis.set_ylabel('mean square of pixels', fontsize=9)
    axis.tick_params(labelsize=8)


def _figure(rows: int, columns: int, width: float, height: float, **kwargs: Any):
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(max(5., width * columns), height * rows + .9), layout='constrained')
    FigureCanvasAgg(figure)  # no window, whatever the environment
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _with_legend(figure: Any, title: str, *axes: Any) -> Any:
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
