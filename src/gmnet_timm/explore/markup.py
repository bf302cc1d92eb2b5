"""What the page shows, as HTML. Names of files and classes come from others, and are escaped."""
import base64
import functools
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from gmnet_timm.explore.pictures import Exploration, Images, Picture, ShownModel
from gmnet_timm.frequency.answers import Change
from gmnet_timm.frequency.bands import Band, SplitOptions
from gmnet_timm.frequency.figures import figure_svg
from gmnet_timm.frequency.plots import displayable, plot_image_spectrum, plot_scan, radius_axis
from gmnet_timm.frequency.signals import LayerSpectrum

__all__ = [
    'cards', 'changes', 'chart', 'command', 'layer_summary', 'mark_positions', 'message', 'scan_charts',
    'spectrum_chart', 'thumbnails',
]

_TITLES = {'raw': 'Whole image', 'low': 'Low-pass', 'band-pass': 'Band', 'high': 'High-pass'}


def message(text: str, kind: str = 'error') -> str:
    """A line that tells the visitor what went wrong, or what is going on."""
    return f'<p class="message {kind}" role="alert">{html.escape(text)}</p>' if text else ''


def cards(picture: Picture, bands: Sequence[Band], options: SplitOptions) -> str:
    """The parts of a picture, each with what the models say of it."""
    about = picture.about
    found = [picture.answers(i, bands, options) for i in range(len(about.models))]
    parts = []
    for column, band in enumerate(bands):
        rows = []
        for group in about.groups():
            rows.append(_part(picture, group[0], band, options))
            for i in group:
                rows.append(_answers(about, i, band, found[i][column], whole=found[i][0][0][0]))
        radius = '' if band.radius is None else html.escape(_range(band))
        parts.append(
            f'<section class="card {band.kind}"><h3>{_TITLES[band.kind]} <span>{radius}</span></h3>'
            f'{"".join(rows)}</section>')
    if len(bands) == 3:
        parts.insert(
            2, '<section class="card band-pass empty"><h3>Band</h3><p>Move the second radius away from the first to '
            'see the frequencies between both.</p></section>')
    # one screen: with more below them, pictures are smaller
    height = {1: 250 - 34 * (len(about.models) - 1), 2: 120}.get(len(about.groups()), 90)
    return f'<div class="cards" style="--height: {max(90, height)}px">{"".join(parts)}</div>'


def _part(picture: Picture, number: int, band: Band, options: SplitOptions) -> str:
    shown, note = displayable(picture.pixels(number, band, options), band.kind)
    size = 'x'.join(map(str, picture.images[number].shape[2:]))
    return f'<img src="{_png(shown)}" alt="{html.escape(str(band))}" title="{size} pixels{note}">'


def _range(band: Band) -> str:
    sign = {'low': '≤ ', 'high': '> '}.get(band.kind, '')
    return sign + str(band).partition(' ')[2].replace('-', '–')


def _answers(about: Exploration, number: int, band: Band, lines: Sequence[tuple[str, float]], whole: str) -> str:
    label = about.models[number].label
    head = f'<h4>{html.escape(label)}</h4>' if len(about.models) > 1 else ''
    items = []
    for rank, (name, confidence) in enumerate(lines):
        kept = 'same' if name == whole else 'other' if rank == 0 else ''
        name = html.escape(name)
        items.append(
            f'<li class="{kept}" style="--p: {100 * confidence:.1f}%"><b title="{name}">{name}</b>'
            f'<i>{100 * confidence:.1f} %</i></li>')
    return f'{head}<ol data-model="{html.escape(label)}" data-band="{html.escape(str(band))}">{"".join(items)}</ol>'


def thumbnails(images: Images, count: int, channels: int) -> str:
    """Images to choose from, evenly spaced."""
    buttons = []
    for index in range(0, images.count, max(1, images.count // count))[:count]:
        try:
            image = images.read(index, channels)
        except Exception:  # a file that cannot be decoded has no thumbnail
            continue
        if isinstance(image, Image.Image):
            image.thumbnail((88, 88))
            name = html.escape(images.name(index))
            buttons.append(
                f'<button data-index="{index}" title="{name}"><img alt="{name}" src="{_png(image)}"></button>')
    return f'<div class="thumbnails">{"".join(buttons)}</div>'


def chart(svg: str, marks: str = '', name: str = '') -> str:
    """A figure with a layer for the marks of the radii above it."""
    source = f'data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}'
    title = html.escape(name)
    return f'<figure class="chart"><h5>{title}</h5><div><img src="{source}" alt="{title}">{marks}</div></figure>'


def spectrum_chart(picture: Picture) -> str:
    """The spectrum of a picture, as the first model takes it."""
    figure, axis = _small_figure()
    plot_image_spectrum(picture.pixels(0, Band('raw'), SplitOptions()), axis)
    axis.set_title('')
    axis.set_ylabel('power per frequency', fontsize=8)
    return chart(figure_svg(figure, crop=False), _MARKS, 'spectrum of the whole image')


def scan_charts(picture: Picture, points: Sequence[Sequence[Any]]) -> str:
    """Confidence in the answer to the whole image against the radius, for each model."""
    about = picture.about
    found = []
    for model, scanned in zip(about.models, points, strict=True):
        if scanned:
            figure, axis = _small_figure()
            plot_scan(scanned, about.largest_radius, axis)
            axis.legend(
                fontsize=7, loc='lower right', bbox_to_anchor=(1.02, .97), ncols=3, frameon=False, columnspacing=1.2,
                handlelength=1.8)
            title = f'confidence in the answer to the whole image: {model.label}'
            found.append(chart(figure_svg(figure, crop=False), _MARKS, title))
    return f'<div class="charts">{"".join(found)}</div>'


def mark_positions(about: Exploration, radius: float, other: float) -> str:
    """A style sheet that moves the marks of the charts to the radii."""
    inner, outer = sorted((int(radius), int(other)))
    percent = _percents(about.largest_radius)
    places = {'start': 0, 'radius': int(radius), 'inner': inner, 'outer': outer, 'end': about.largest_radius}
    return f'<style>:root {{{"".join(f"--{name}: {percent[x]:.2f}%;" for name, x in places.items())}}}</style>'


@functools.lru_cache
def _percents(largest: int) -> list[float]:
    """Where each radius is in a chart, in percent of its width."""
    figure, axis = _small_figure()
    radius_axis(axis, largest)
    return [100 * axis.transData.transform((x, 0))[0] / figure.bbox.width for x in range(largest + 1)]


def changes(about: Exploration, found: Sequence[Sequence[Change] | None]) -> str:
    """Where the answers change, as buttons that set the radius.

    Args:
        about: What the page is about.
        found: All changes of each model, None for a model whose radii were not all looked at yet.
    """
    rows = []
    for model, mine in zip(about.models, found, strict=True):
        head = f'<h4>{html.escape(model.label)}</h4>' if len(about.models) > 1 else ''
        rows.append(head + ''.join(_change(model, kind, mine) for kind in ('low', 'high')))
    return f'<div class="changes"><h3>Where the answer changes first</h3>{"".join(rows)}</div>'


def _change(model: ShownModel, kind: str, found: Sequence[Change] | None) -> str:
    title = f'<p data-kind="{kind}" data-scanned="{found is not None}"><b class="{kind}">{_TITLES[kind]}</b> '
    if found is None:
        return f'{title}looking at all whole radii …</p>'
    mine = [change for change in found if change.kind == kind]
    if not mine:
        return f'{title}no change at any whole radius</p>'
    first, others = mine[0], len(mine) - 1
    note = f'and {others} more change{"s" if others > 1 else ""} beyond' if others else 'the only change'
    names = ' → '.join(
        html.escape(model.class_names[i] if model.class_names else f'class {i}') for i in (first.before, first.after))
    return (f'{title}<button data-radius="{first.radius}" title="set the radius">r = {first.radius}</button> {names} '
            f'<small>({note})</small></p>')


def command(lines: str) -> str:
    """Commands to copy."""
    return f'<pre title="prints the same"><code>{html.escape(lines)}</code></pre>'


def layer_summary(layer: LayerSpectrum) -> str:
    """The numbers of a layer in a line."""
    cells = ''.join(
        f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>'
        for name, value in layer.described().items())
    return f'<dl class="summary">{cells}</dl>'


_MARKS = '<div class="marks"><i class="low"></i><i class="band-pass"></i><i class="high"></i><hr></div>'


def _small_figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.4, 1.95))
    axis = figure.subplots()
    figure.subplots_adjust(left=.125, right=.985, bottom=.225, top=.91)
    figure.patch.set_alpha(0)
    return figure, axis


def _png(picture: Any) -> str:
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray((255 * picture).round().astype('uint8'))
    file = io.BytesIO()
    picture.convert('RGB' if picture.mode not in ('L', 'RGB') else picture.mode).save(file, 'png', compress_level=1)
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'
