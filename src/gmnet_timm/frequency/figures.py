"""Figures of the frequency view: `draw_…` arranges plots in a Figure, `save_figure` writes it as PNG, PDF or SVG."""
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gmnet_timm.errors import UserError, require
from gmnet_timm.files import replacing
from gmnet_timm.frequency.amplitude import LogAmplitude
from gmnet_timm.frequency.bands import BANDS, Band, BandAccuracy
from gmnet_timm.frequency.heatmap import HeatmapPoint
from gmnet_timm.frequency.plots import (
    LINES,
    displayable,
    plot_accuracy,
    plot_gain,
    plot_heatmap,
    plot_image_spectrum,
    plot_log_amplitude,
    plot_radial_error,
    plot_sensitivity,
    plot_spectrum,
)
from gmnet_timm.frequency.sensitivity import Sensitivity
from gmnet_timm.frequency.signals import SIGNAL_NAMES, LayerSpectrum
from gmnet_timm.frequency.split import log_amplitude_spectrum

__all__ = [
    'Curves', 'band_curves', 'draw_band_accuracy', 'draw_band_curves', 'draw_heatmaps', 'draw_image_panel',
    'draw_layers', 'draw_log_amplitudes', 'draw_maps', 'draw_sensitivity', 'new_figure', 'save_figure', 'with_legend',
]

# label -> (band, radius as text) -> points (x, percent, lower bound, upper bound)
Curves = Mapping[str, Mapping[tuple[str, str], Sequence[tuple[float, float, float, float]]]]

_MOST_PANELS = 40


def band_curves(results: Mapping[str, Sequence[BandAccuracy | Mapping[str, Any]]]) -> Curves:
    """Accuracies against the radius; a band between two radii stands in their middle.

    Args:
        results: By label, what `evaluate_bands` returns, or its rows in a table.
    """
    curves: dict[str, dict[tuple[str, str], list[tuple[float, float, float, float]]]] = {}
    for label, bands in results.items():
        for band in bands:
            row = band.as_row() if isinstance(band, BandAccuracy) else band
            x = float(row['radius'] or 0)
            if row['inner_radius']:
                x = (x + float(row['inner_radius'])) / 2
            points = curves.setdefault(label, {}).setdefault((row['band'], ''), [])
            points.append((x, float(row['top1']), float(row['top1_low']), float(row['top1_high'])))
    return curves


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


def draw_band_accuracy(
        results: Mapping[str, Sequence[BandAccuracy | Mapping[str, Any]]],
        title: str = '',
        chance: float | None = None,
) -> Any:
    """Accuracies against the radius: a panel per kind of band, a line per model, and its accuracy on raw images.

    Args:
        results: As for `band_curves`.
        title: Title of the figure.
        chance: Accuracy at chance in percent.
    """
    curves = band_curves(results)
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
        drawn = [layer for layer in layers if len(layer.curve) > 1] or layers  # a map of 2×2 has its mean alone
        for layer, alpha in ((drawn[0], .4), (drawn[-1], 1.)):
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
        radius = '' if band.radius is None else f', r = {str(band).partition(" ")[2]}'
        axis.set_title(band.kind + radius + note, fontsize=10)
        axis.set_xlabel('\n'.join(f'{name} {100 * confidence:.0f} %' for name, confidence in lines), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    plot_image_spectrum(parts[0][1], axes[1][0], radii=sorted({band.radius for band, _ in parts if band.radius}))
    for axis in axes.flat:
        if not axis.has_data():
            axis.axis('off')
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


def save_figure(figure: Any, path: str | Path, force: bool = True, width: float | None = None) -> None:
    """Write a figure as PNG, PDF or SVG, by the suffix of the path; fonts stay text in PDF and SVG.

    Args:
        figure: The figure.
        path: The file.
        force: Replace an existing file.
        width: In inches, such as that of a column in print; by default what is drawn needs.

    Raises:
        UserError: There is no such format, or the file exists and `force` is not set.
    """
    import matplotlib
    if width is not None:
        old, height = figure.get_size_inches()
        figure.set_size_inches(width, height * width / old)
    try:
        with replacing(path, force=force) as temporary, \
                matplotlib.rc_context({'pdf.fonttype': 42, 'svg.fonttype': 'none'}):
            figure.savefig(temporary, dpi=130, bbox_inches='tight' if width is None else None)
    except ValueError as e:  # matplotlib knows no such format
        raise UserError(f'Cannot write {path}: {e}') from e


def new_figure(rows: int, columns: int, width: float, height: float, **kwargs: Any):
    figure = require('matplotlib.figure', 'freq').Figure(  # has no window, whatever the environment
        figsize=(max(5., width * columns), height * rows + .9), layout='constrained')
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
