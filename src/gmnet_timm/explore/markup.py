"""What the page shows, as HTML. Names of files and classes come from others, and are escaped."""
import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from gmnet_timm.explore.pictures import Images, Picture
from gmnet_timm.frequency.bands import Band, SplitOptions
from gmnet_timm.frequency.plots import displayable, plot_image_spectrum
from gmnet_timm.frequency.signals import LayerSpectrum
from gmnet_timm.frequency.split import num_radial_bins

__all__ = [
    'cards', 'chart', 'command', 'layer_summary', 'mark_positions', 'message', 'spectrum_chart', 'thumbnails',
]

_TITLES = {'raw': 'Whole image', 'low': 'Low-pass', 'band-pass': 'Band', 'high': 'High-pass'}
_MARKS = '<div class="marks"><i class="low"></i><i class="band-pass"></i><i class="high"></i><hr></div>'
_LEFT, _RIGHT = .08, .99  # of the axis in the chart below the marks, as shares of its width


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
            shown, note = displayable(picture.pixels(group[0], band, options), band.kind)
            size = 'x'.join(map(str, picture.images[group[0]].shape[2:]))
            rows.append(f'<img src="{_png(shown)}" alt="{band}" title="{size} pixels{note}">')
            rows += [_answers(about.models[i].label, band, found[i][column], whole=found[i][0][0][0]) for i in group]
        sign = {'low': '≤ ', 'high': '&gt; '}.get(band.kind, '')
        radius = '' if band.radius is None else sign + str(band).partition(' ')[2].replace('-', '–')
        parts.append(
            f'<section class="card {band.kind}"><h3>{_TITLES[band.kind]} <span>{radius}</span></h3>'
            f'{"".join(rows)}</section>')
    if len(bands) == 3:
        parts.insert(
            2, '<section class="card band-pass empty"><h3>Band</h3><p>Move the second radius away from the first to '
            'see the frequencies between both.</p></section>')
    # one screen: with more below them, pictures are smaller
    height = {1: 250 - 34 * (len(about.models) - 1), 2: 120}.get(len(about.groups()), 90)
    models = 'one' if len(about.models) == 1 else 'several'
    return f'<div class="cards {models}" style="--height: {max(90, height)}px">{"".join(parts)}</div>'


def _answers(label: str, band: Band, lines: Sequence[tuple[str, float]], whole: str) -> str:
    label = html.escape(label)
    items = []
    for rank, (name, confidence) in enumerate(lines):
        kept = 'same' if name == whole else 'other' if rank == 0 else ''
        name = html.escape(name)
        items.append(
            f'<li class="{kept}" style="--p: {100 * confidence:.1f}%"><b title="{name}">{name}</b>'
            f'<i>{100 * confidence:.1f} %</i></li>')
    return f'<h4>{label}</h4><ol data-model="{label}" data-band="{band}">{"".join(items)}</ol>'


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


def chart(figure: Any, marks: str = '', name: str = '') -> str:
    """A figure, with a layer for the marks of the radii above it. With one, its margins stay as they are."""
    from matplotlib import rc_context
    svg = io.BytesIO()
    with rc_context({'svg.fonttype': 'none'}):
        figure.savefig(svg, format='svg', bbox_inches=None if marks else 'tight')
    source = f'data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}'
    return f'<figure class="chart"><h5>{name}</h5><div><img src="{source}" alt="{name}">{marks}</div></figure>'


def spectrum_chart(picture: Picture) -> str:
    """The spectrum of a picture, as the first model takes it."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 1.9))
    axis = figure.subplots(gridspec_kw=dict(left=_LEFT, right=_RIGHT, bottom=.225, top=.91))
    figure.patch.set_alpha(0)
    plot_image_spectrum(picture.pixels(0, Band('raw'), SplitOptions()), axis)
    axis.set(title='', ylabel='')
    return chart(figure, _MARKS, 'power per frequency of the whole image: mean square of pixels')


def mark_positions(picture: Picture, radius: int, other: int) -> str:
    """A style sheet that moves the marks of the chart to the radii."""
    inner, outer = sorted((radius, other))
    end = num_radial_bins(*picture.images[0].shape[-2:]) - 1
    places = {'start': 0, 'radius': radius, 'inner': inner, 'outer': outer, 'end': end}
    marks = []
    for name, place in places.items():
        share = _LEFT + (_RIGHT - _LEFT) * math.log1p(place) / math.log1p(end)  # as the axis is
        marks.append(f'--{name}: {100 * share:.2f}%;')
    return f'<style>:root {{{"".join(marks)}}}</style>'


def command(lines: str) -> str:
    """Commands to copy."""
    return f'<pre title="prints the same"><code>{html.escape(lines)}</code></pre>'


def layer_summary(layer: LayerSpectrum) -> str:
    """The numbers of a layer in a line."""
    cells = ''.join(
        f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>'
        for name, value in layer.described().items())
    return f'<dl class="summary">{cells}</dl>'


def _png(picture: Any) -> str:
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray((255 * picture).round().astype('uint8'))
    file = io.BytesIO()
    picture.convert('RGB' if picture.mode not in ('L', 'RGB') else picture.mode).save(file, 'png', compress_level=1)
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'
