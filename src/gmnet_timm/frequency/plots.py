"""Figures of the frequency view. Dashes and markers tell lines apart, so that they can be read without colour."""
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch

from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing
from gmnet_timm.frequency.extras import require_matplotlib
from gmnet_timm.frequency.spectra import LayerSpectrum
from gmnet_timm.frequency.split import radial_power_spectrum

__all__ = [
    'Curves', 'plot_band_curves', 'plot_image_panel', 'plot_layer_gains', 'plot_layer_spectra',
]

# label -> (band, radius as text) -> points (epoch, percent, lower end, upper end)
Curves = Dict[str, Dict[Tuple[str, str], List[Tuple[float, float, float, float]]]]

_LINES: List[Dict[str, Any]] = [
    dict(linestyle='-', marker='o', color='black'),
    dict(linestyle='--', marker='s', color='#0072b2', markerfacecolor='white'),
    dict(linestyle='-.', marker='^', color='#d55e00'),
    dict(linestyle=':', marker='D', color='#777777', markerfacecolor='white'),
    dict(linestyle=(0, (5, 1)), marker='v', color='#009e73'),
    dict(linestyle=(0, (1, 1)), marker='X', color='#aa4499'),
]


def plot_band_curves(curves: Curves, path: Path, title: str = '', intervals: str = '') -> None:
    """Draw accuracies against epochs: a column each for raw, low and high, a row a radius, a line a model.

    Args:
        curves: Points by label, band and radius.
        path: Image file to write.
        title: Title of the figure.
        intervals: What the bars are.
    """
    radii = sorted({radius for bands in curves.values() for _, radius in bands if radius}, key=float)
    figure, axes = _figure(max(1, len(radii)), 3, 3.6, 2.9, sharex=True)
    for row, radius in enumerate(radii or ['']):
        for axis, band in zip(axes[row], ('raw', 'low', 'high'), strict=True):
            if row and band == 'raw':
                axis.axis('off')  # the first row has it
                continue
            key = (band, '' if band == 'raw' else radius)
            for i, (label, bands) in enumerate(curves.items()):
                _draw_points(axis, bands.get(key, []), label, i, len(curves))
            axis.set_title('raw' if band == 'raw' else f'{band}, r = {radius} cycles/image', fontsize=10)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=.3)
        axes[row][1 if row else 0].set_ylabel('top-1 (%)')
    for axis in [axes[0][0], *axes[-1][1:]]:
        axis.set_xlabel('epoch')
        axis.tick_params(labelbottom=True)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, path, ', '.join(filter(None, [title, intervals])), axes[0][0])


def plot_image_panel(
        parts: Sequence[Tuple[str, Optional[float], torch.Tensor]],
        answers: Sequence[Sequence[Tuple[str, float]]],
        path: Path,
        title: str = '',
) -> None:
    """Draw a picture, its low parts above its high parts, and what a model says of each.

    Args:
        parts: Band, radius and pixels (C, H, W) of each part, 0…1 for the raw picture, raw first.
        answers: For each part class and confidence (0…1), most confident first.
        path: Image file to write.
        title: Title of the figure.
    """
    radii = [radius for band, radius, _ in parts if band == 'low']
    figure, axes = _figure(2, 1 + len(radii), 2.7, 3.3)
    for (band, radius, pixels), lines in zip(parts, answers, strict=True):
        row = 1 if band == 'high' else 0
        column = 0 if radius is None else radii.index(radius) + 1
        shown, note = _displayable(pixels, band)
        axis = axes[row][column]
        axis.imshow(shown, cmap='gray', vmin=0, vmax=1)
        axis.set_title('raw' if radius is None else f'{band}, r = {radius:g}{note}', fontsize=10)
        axis.set_xlabel('\n'.join(f'{name} {100 * confidence:.0f} %' for name, confidence in lines), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    _draw_spectrum(axes[1][0], parts[0][2], radii)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_layer_spectra(layers: Sequence[LayerSpectrum], path: Path, title: str = '') -> None:
    """Draw the spectra of each layer's input and output, each relative to its energy without the mean."""
    def draw(axis, layer: LayerSpectrum) -> None:
        for label, power, style in (('before', layer.before, _LINES[1]), ('after', layer.after, _LINES[0])):
            mean = power.mean(0)[1:]
            axis.semilogy(range(1, len(mean) + 1), mean / mean.sum(), label=label, markersize=3, **style)
        axis.axvline(layer.cutoff + .5, color='gray', linewidth=.8)
        axis.text(
            .97, .95, f'high/low {layer.high_low_ratio(False):.2g} → {layer.high_low_ratio(True):.2g}',
            transform=axis.transAxes, ha='right', va='top', fontsize=8)

    _layer_grid(layers, path, draw, 'share of energy', f'{title}; grey line: where low ends')


def plot_layer_gains(layers: Sequence[LayerSpectrum], path: Path, title: str = '') -> None:
    """Draw each layer's gain curve with its interval over images."""
    def draw(axis, layer: LayerSpectrum) -> None:
        gain, low, high = (values[1:] for values in layer.gain())
        rings = range(1, len(gain) + 1)
        axis.plot(rings, gain, label='after / before', markersize=3, **_LINES[0])
        axis.fill_between(rings, low, high, color='gray', alpha=.4, label='95 % interval over images')
        axis.set_ylim(bottom=0)

    _layer_grid(layers, path, draw, 'power gain', title)


def _layer_grid(layers: Sequence[LayerSpectrum], path: Path, draw, ylabel: str, title: str) -> None:
    layers = [layer for layer in layers if layer.before.shape[1] > 2]  # two rings make no curve
    if not layers:
        raise UserError('The feature maps are too small for a figure of their spectra. Use larger images.')
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure, axes = _figure(rows, columns, 2.9, 2.4)
    flat = [axis for row in axes for axis in row]
    for axis, layer in zip(flat, layers, strict=False):
        draw(axis, layer)
        axis.set_title(f'{layer.name} ({layer.size[0]}×{layer.size[1]})', fontsize=9)
        axis.grid(alpha=.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
    for axis in flat[len(layers):]:
        axis.axis('off')
    for row in axes:
        row[0].set_ylabel(ylabel, fontsize=9)
    for i in range(max(0, len(layers) - columns), len(layers)):
        flat[i].set_xlabel('cycles per feature map', fontsize=9)
    _finish(figure, path, title, flat[0])


def _draw_points(axis, points, label: str, index: int, count: int) -> None:
    if not points:
        return
    epochs, middle, low, high = zip(*points, strict=True)
    # apart by a fraction of an epoch, so that bars do not hide each other
    shifted = [epoch + .12 * (index - (count - 1) / 2) for epoch in epochs]
    errors = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
    axis.errorbar(
        shifted, middle, yerr=errors, label=label, markersize=4.5, linewidth=1.3, elinewidth=.8, capsize=1.5,
        **_LINES[index % len(_LINES)])


def _displayable(pixels: torch.Tensor, band: str) -> Tuple[Any, str]:
    """Pixels as matplotlib takes them. High parts vary around their mean: drawn around mid-grey, and stretched."""
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


def _draw_spectrum(axis, image: torch.Tensor, radii: Sequence[Optional[float]]) -> None:
    power = radial_power_spectrum(image.detach().float().cpu()).mean(0)[1:]
    axis.loglog(range(1, len(power) + 1), power, color='black')
    for radius in radii:
        if radius:
            axis.axvline(radius, color='gray', linestyle='--', linewidth=.8)
            axis.text(
                radius, .99, f'{radius:g}', transform=axis.get_xaxis_transform(), fontsize=8, ha='right', va='top')
    axis.set_title('power of each ring', fontsize=10)
    axis.set_xlabel('radius (cycles/image)', fontsize=9)
    axis.set_ylabel('mean square of pixels', fontsize=9)
    axis.tick_params(labelsize=8)


def _figure(rows: int, columns: int, width: float, height: float, **kwargs: Any):
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width * columns, height * rows + .6), layout='constrained')
    FigureCanvasAgg(figure)  # no window, whatever the environment
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _finish(figure, path: Path, title: str, labelled_axis) -> None:
    handles, labels = labelled_axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(4, len(labels)), handlelength=4, frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130)
    except ValueError as e:  # matplotlib knows no such format
        raise UserError(f'Cannot write {path}: {e}') from e
