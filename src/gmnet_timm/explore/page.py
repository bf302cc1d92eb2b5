"""The page: its components, and what happens when a visitor touches one. Needs Gradio (extra `explore`).

Whatever a request holds comes from outside: it chooses among what is there, and never names a file to write or delete.
Gradio keeps uploads in its own folder, and removes them by its own `delete_cache`.
"""
import contextlib
import functools
import html
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gradio as gr
import torch
from gradio.utils import get_upload_folder

from gmnet_timm.errors import UserError
from gmnet_timm.explore import markup
from gmnet_timm.explore.pictures import TOP, Exploration, Images, Picture, read_upload, shown_bands
from gmnet_timm.frequency import figures
from gmnet_timm.frequency.answers import Change, ScanPoint, list_changes, scan_radii
from gmnet_timm.frequency.bands import SPACES, Band, SplitOptions
from gmnet_timm.frequency.data import read_picture
from gmnet_timm.frequency.reports import csv_text
from gmnet_timm.frequency.signals import LayerSpectrum
from gmnet_timm.frequency.spectra import layer_spectra, list_layers, strongest_channels
from gmnet_timm.frequency.split import default_radii, radial_power_spectrum

__all__ = ['Page', 'look_of_the_page']

_THUMBNAILS = 6
_MAPS = 8  # channels that are drawn
_BATCH_SIZE = 8  # parts per pass of the scan: short passes, so that a visitor does not wait long
_KINDS = ('gate', 'activation', 'module')  # of layers, what the page is about first
_SESSION_SECONDS = 3600
_CACHE_SECONDS = (60, 600)  # Gradio removes an upload that is older than the second, and looks every first
_DOWNLOAD = '''(files) => {
    for (const file of files ?? []) {
        const link = document.createElement('a');
        link.href = URL.createObjectURL(new Blob([file.text], {type: file.type}));
        link.download = file.name;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
}'''
_ON_CLICK = '''element.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (button) trigger('select', {...button.dataset});
});'''


class Session:
    """What one visitor looks at. It is forgotten an hour after its last picture was opened."""

    def __init__(self) -> None:
        self.picture: Picture | None = None
        self.scans = 0  # the last one that was started; an older one stops
        self.points: list[list[ScanPoint]] = []
        self.layer: LayerSpectrum | None = None
        self.layer_figures: list[Any] = []


with mock.patch('gradio.component_meta.create_or_modify_pyi'):  # writes a file beside the source of a component
    class _Upload(gr.File):
        """Where a picture is dropped. Gives its name and its bytes, and nothing that is not an upload."""

        is_template = True  # in the browser it is a gr.File
        max_bytes = 0

        async def async_move_resource_to_block_cache(self, url_or_file_path):
            # Gradio downloads what is an address, and remembers any path of a request in order to delete it later.
            self._read(str(url_or_file_path))
            return await super().async_move_resource_to_block_cache(url_or_file_path)

        def preprocess(self, payload: Any) -> Any:
            return None if payload is None else self._read(payload.path)

        def _read(self, path: str) -> tuple[str, bytes]:
            try:
                return read_upload(path, get_upload_folder(), self.max_bytes)
            except (UserError, OSError, ValueError) as e:
                raise _refused(str(e) if isinstance(e, UserError) else 'This cannot be read.') from None


def look_of_the_page() -> dict[str, Any]:
    """Arguments of Gradio's `launch` for the looks: fonts of the system, nothing from elsewhere."""
    fonts = ['system-ui', '-apple-system', 'Segoe UI', 'Roboto', 'Helvetica', 'Arial', 'sans-serif']
    theme = gr.themes.Base(
        primary_hue='sky', neutral_hue='slate', spacing_size='sm', radius_size='md', text_size='sm',
        font=[gr.themes.Font(name) for name in fonts],
        font_mono=[gr.themes.Font(name) for name in ('ui-monospace', 'Menlo', 'Consolas', 'monospace')])
    return dict(theme=theme, css_paths=[Path(__file__).with_name('page.css')], footer_links=[])


class Page:
    """The page about models and images: `blocks` is what Gradio serves."""

    def __init__(self, about: Exploration):
        self.about = about
        with gr.Blocks(
                title='gmnet-timm: what a model sees at each frequency', analytics_enabled=False,
                delete_cache=_CACHE_SECONDS, fill_width=True) as self.blocks:
            self.session = gr.State(Session(), time_to_live=_SESSION_SECONDS)
            names = ' · '.join(model.label for model in about.models)
            gr.HTML(f'<header><h1>What a model sees at each frequency</h1><p>{html.escape(names)}</p></header>')
            with gr.Tabs():
                with gr.Tab('Image'):
                    self._image_tab()
                with gr.Tab('Inside') as inside:
                    self._inside_tab(inside)

    @property
    def images(self) -> Images:
        """The images, for what is only on the page where there are some."""
        assert self.about.images is not None
        return self.about.images

    def _on(self, event: Any, fn: Any, inputs: Sequence[Any] = (), outputs: Sequence[Any] = (), **kwargs: Any) -> Any:
        """Call `fn` on an event. Nothing is offered as an API."""
        return event(
            fn, list(inputs), list(outputs), api_visibility='private',
            **{'show_progress': 'hidden', 'trigger_mode': 'always_last', **kwargs})

    def _save_button(self, name: str, fn: Any, inputs: Sequence[Any]) -> None:
        """A button that hands the files of `fn` to the browser, without one on this machine."""
        files = gr.JSON(visible=False)
        button = gr.Button('Save figures (SVG) and numbers (CSV)', size='sm', scale=0, elem_id=name)
        self._on(button.click, fn, inputs, [files]).then(None, [files], js=_DOWNLOAD)

    # --- image -------------------------------------------------------------------------------------------------------

    def _image_tab(self) -> None:
        about = self.about
        largest = about.largest_radius
        first, second = default_radii([model.config['input_size'] for model in about.models])
        with gr.Row(elem_id='image'):
            with gr.Column(elem_id='controls', scale=0, min_width=300):
                self.file = _Upload(label='Picture', show_label=False, height=86, elem_id='file')
                self.file.max_bytes = about.max_bytes
                self.message = gr.HTML(elem_id='message')
                if about.images is not None and about.images.count:
                    self.thumbnails = gr.HTML(js_on_load=_ON_CLICK, elem_id='thumbnails')
                self.radius = gr.Slider(
                    0, largest, first, step=1, label='Radius (cycles per image)', elem_id='radius', buttons=[])
                self.other = gr.Slider(
                    0, largest, second, step=1, label='Second radius, for the band', elem_id='other', buttons=[])
                with gr.Group(elem_id='options'):
                    self.keep_dc = gr.Checkbox(label='Keep the mean (DC) in band and high-pass', elem_id='keep-dc')
                    self.contrast = gr.Checkbox(label='Restore their contrast', elem_id='contrast')
                    self.space = gr.Radio(
                        list(SPACES), value=SPACES[0], label='Split the values as', elem_id='space')
                self.changes = gr.HTML(js_on_load=_ON_CLICK, elem_id='changes')
            with gr.Column(elem_id='view', min_width=300):
                self.cards = gr.HTML(_WELCOME, elem_id='cards')
                with gr.Row(elem_id='charts'):
                    self.spectrum = gr.HTML(elem_id='spectrum', min_width=200)
                    self.scan = gr.HTML(elem_id='scan', min_width=200)
                self.marks = gr.HTML(elem_id='marks')
                with gr.Row(elem_id='bottom'):
                    self.command = gr.HTML(elem_id='command')
                    options: list[Any] = [self.keep_dc, self.contrast, self.space]
                    self.view = [self.session, self.radius, self.other, *options]
                    self._save_button('save', self.save, self.view)
        self.moved = [self.cards, self.marks, self.command]
        # A number that is typed beside a slider can be out of range: it is corrected in the browser, before it is sent.
        inside = f'(x) => Math.min({largest}, Math.max(0, Math.round(x ?? 0)))'
        for slider in (self.radius, self.other):
            slider.input(None, [slider], [slider], js=f'(x) => x === null ? x : ({inside})(x)')
            self._on(
                slider.input, self.move, self.view, self.moved, queue=False,
                js=f'(s, r, o, ...options) => [s, ({inside})(r), ({inside})(o), ...options]')
        for option in options:
            self._scan_after(self._on(option.input, self.move, self.view, self.moved, queue=False))
        opened = [self.session, self.message, *self.moved, self.spectrum, self.scan, self.changes]
        self._scan_after(self._on(self.file.upload, self.upload, [self.file, *self.view], [self.file, *opened]))
        self._on(self.changes.select, self.jump, self.view, [self.radius, *self.moved], queue=False)
        if about.images is not None and about.images.count:
            self._scan_after(self._on(self.thumbnails.select, self.choose, self.view, opened))
            self._scan_after(self._on(self.blocks.load, self.start, self.view, [self.thumbnails, *opened]))

    def _scan_after(self, event: Any) -> None:
        self._on(
            event.then, self.look_for_changes, self.view, [self.scan, self.changes], concurrency_limit=4,
            trigger_mode='multiple')

    def _checked(self, radius: Any, other: Any, keep_dc: Any, contrast: Any, space: Any) -> Any:
        """Radii and options of a request. The page itself sends none that are refused here."""
        if not all(isinstance(r, (int, float)) and 0 <= r <= self.about.largest_radius for r in (radius, other)):
            raise _refused(f'A radius is a number from 0 to {self.about.largest_radius} cycles per image.')
        if not (isinstance(keep_dc, bool) and isinstance(contrast, bool) and space in SPACES):
            raise _refused('There is no such option.')
        return round(radius), round(other), SplitOptions(keep_dc, contrast, space)

    def move(self, session, *view: Any) -> tuple[Any, ...]:
        """The radii or an option have moved."""
        radius, other, options = self._checked(*view)
        picture = session.picture
        if picture is None:
            return _WELCOME, '', ''
        with self.about.lock, _shown_errors():
            cards = markup.cards(picture, shown_bands(radius, other), options)
        marks = markup.mark_positions(self.about, radius, other)
        return cards, marks, self.image_command(picture, radius, other, options)

    def image_command(self, picture: Picture, radius: float, other: float, options: SplitOptions) -> str:
        """The commands that print the same."""
        radii = [f'{r:g}' for r in dict.fromkeys((radius, other))]
        bands = ['low', 'high', *(['band-pass'] if len(radii) > 1 else [])]
        lines = [
            self.about.command(
                'image', picture.name, '--model', model.spec, *self.about.stated_names, '--radii', *radii, '--bands',
                *bands, '--top', TOP, *_words(options))
            for model in self.about.models
        ]
        return markup.command('\n'.join(lines))

    def open(self, session: Session, name: str, read: Any, *view: Any) -> tuple[Any, ...]:
        """Open a picture. What is wrong with it is said on the page, and the last one stays.

        The session is an output too: Gradio counts its time to live from when it last was one.
        """
        self._checked(*view)
        try:
            with self.about.lock:
                picture = self.about.open_picture(name, read)
                spectrum = markup.spectrum_chart(picture)
        except UserError as e:
            return session, markup.message(str(e)), *[gr.skip()] * 6
        session.picture, session.scans = picture, session.scans + 1
        session.points, session.layer = [], None
        note = f'{Path(picture.name).name}, {picture.size[0]}×{picture.size[1]} pixels'
        return session, markup.message(note, 'note'), *self.move(session, *view), spectrum, '', ''

    def upload(self, file, session, *view: Any) -> tuple[Any, ...]:
        """A visitor has sent a file."""
        if file is None:
            return (gr.skip(),) * 9
        name, content = file
        return None, *self.open(session, name, lambda channels: read_picture(content, channels, name=name), *view)

    def start(self, session, *view: Any) -> tuple[Any, ...]:
        """The page was opened: show the first of the images."""
        return markup.thumbnails(self.images, _THUMBNAILS, self.about.models[0].channels), *self._open_nth(
            session, 0, *view)

    def choose(self, session, radius, other, keep_dc, contrast, space, event: gr.EventData) -> tuple[Any, ...]:
        """A thumbnail was clicked."""
        index = _event_number(event, 'index', self.images.count - 1)
        return self._open_nth(session, index, radius, other, keep_dc, contrast, space)

    def _open_nth(self, session: Session, index: int, *view: Any) -> tuple[Any, ...]:
        return self.open(
            session, self.images.name(index), lambda channels: self.images.read(index, channels), *view)

    def jump(self, session, radius, other, keep_dc, contrast, space, event: gr.EventData) -> tuple[Any, ...]:
        """A change of the answer was clicked: go to its radius."""
        radius = _event_number(event, 'radius', self.about.largest_radius)
        return radius, *self.move(session, radius, other, keep_dc, contrast, space)

    def look_for_changes(self, session, *view: Any) -> Iterator[tuple[Any, ...]]:
        """Look at all whole radii of one model after the other, and say where the answer changes."""
        *_, options = self._checked(*view)
        picture, about = session.picture, self.about
        if picture is None:
            return
        session.scans += 1
        this = session.scans
        points: list[list[ScanPoint]] = [[] for _ in about.models]
        session.points = points
        found: list[list[Change] | None] = [None for _ in about.models]
        yield gr.skip(), markup.changes(about, found)
        for i, model in enumerate(about.models):
            scan = scan_radii(model.loaded.model, picture.split(i, options), batch_size=_BATCH_SIZE)
            while (some := self._next(scan)) is not None:
                if session.scans != this:  # of another picture or with other options
                    return
                points[i] += some
                time.sleep(.01)  # whoever moves a slider takes the lock now
            found[i] = [change for kind in ('low', 'high') for change in list_changes(points[i], kind)]
            yield markup.scan_charts(picture, points), markup.changes(about, found)

    def _next(self, scan: Iterator[Any]) -> Any:
        with self.about.lock, _shown_errors():
            return next(scan, None)

    def save(self, session, *view: Any) -> list[dict[str, str]]:
        """The parts, the spectrum and the confidence by radius as figures and as tables, as far as they are known."""
        radius, other, options = self._checked(*view)
        picture, about, bands = session.picture, self.about, shown_bands(radius, other)
        if picture is None:
            return []
        name, stem = Path(picture.name).name, Path(picture.name).stem
        raw = picture.pixels(0, Band('raw'), SplitOptions())
        spectrum = radial_power_spectrum(raw).mean(0).tolist()
        found = [
            _csv(f'{stem}-answers', picture.rows(bands, options)),
            _csv(f'{stem}-spectrum', [dict(radius=k, power=power) for k, power in enumerate(spectrum)]),
            _svg(f'{stem}-spectrum', figures.draw_image_spectrum(raw, name)),
        ]
        for i, model in enumerate(about.models):
            parts = [(band, picture.pixels(i, band, options)) for band in bands]
            title = f'{model.label}: {name}, radii in cycles per image'
            figure = figures.draw_image_panel(parts, picture.answers(i, bands, options), title)
            found.append(_svg(f'{stem}-{model.label}', figure))
        scanned = {model.label: points for model, points in zip(about.models, session.points) if points}
        if scanned:
            rows = [dict(model=label, picture=picture.name, **point.as_row())
                    for label, points in scanned.items() for point in points]
            found.append(_csv(f'{stem}-radii', rows))
            found.append(_svg(f'{stem}-radii', figures.draw_scan(scanned, about.largest_radius, name)))
        return found

    # --- inside ------------------------------------------------------------------------------------------------------

    def _inside_tab(self, tab: Any) -> None:
        labels = [model.label for model in self.about.models]
        with gr.Row():
            self.model = gr.Dropdown(labels, value=labels[0], label='Model', elem_id='model', visible=len(labels) > 1)
            self.layer = gr.Dropdown(label='Layer: gates, activations read as gates, blocks', elem_id='layer')
        self.inside_message = gr.HTML(_NO_PICTURE, elem_id='inside-message')
        with gr.Row(elem_id='inside'):
            self.layer_spectrum = gr.HTML(elem_id='layer-spectrum', min_width=300)
            self.layer_maps = gr.HTML(elem_id='layer-maps', min_width=300)
        with gr.Row(elem_classes='bottom'):
            self.layer_command = gr.HTML(elem_id='layer-command')
            self._save_button('save-layer', self.save_layer, [self.session])
        inputs = [self.session, self.model, self.layer]
        outputs = [self.inside_message, self.layer_spectrum, self.layer_maps, self.layer_command]
        for event in (tab.select, self.model.input):
            self._on(event, self.list_layers, [self.model, self.layer], [self.layer]).then(
                self.look_inside, inputs, outputs, show_progress='minimal', api_visibility='private')
        self._on(self.layer.input, self.look_inside, inputs, outputs, show_progress='minimal')

    @functools.cache  # noqa: B019, the page lives as long as the process
    def layers_of(self, number: int) -> dict[str, tuple[str, str]]:
        """Layers of a model that can be looked at, name and kind by what the picker shows."""
        model = self.about.models[number]
        images = torch.zeros(2, *model.config['input_size'], device=self.about.device)
        with self.about.lock:
            found = list_layers(model.loaded.model, images)
        return {
            f'{name or "the model itself"} ({"block" if kind == "module" else kind})': (name, kind)
            for name, kind in sorted(found, key=lambda entry: _KINDS.index(entry[1]))}

    def list_layers(self, label, layer) -> Any:
        """Fill the picker."""
        choices = list(self.layers_of(self._number(label)))
        return gr.Dropdown(choices, value=layer if layer in choices else next(iter(choices), None))

    def look_inside(self, session, label, layer) -> tuple[Any, ...]:
        """Spectra and maps of a layer for the picture."""
        number = self._number(label)
        layers = self.layers_of(number)
        if session.picture is None:
            return _NO_PICTURE, '', '', ''
        if layer is None and not layers:
            return markup.message('This model has no layer with maps.'), '', '', ''
        if layer not in layers:
            raise _refused('The model has no such layer.')
        model, image = self.about.models[number], session.picture.images[number]
        name, kind = layers[layer]
        maps: dict[str, torch.Tensor] = {}
        chosen: dict[str, Any] = dict(modules=[name]) if kind == 'module' else dict(gates=[name], kinds=[kind])
        try:
            with self.about.lock:
                spectra = layer_spectra(
                    model.loaded.model, [(image, torch.zeros(1))], **chosen, channels=None,
                    on_maps=lambda _, signal, x: maps.update({signal: x[0].cpu()}))
        except UserError as e:
            return markup.message(str(e)), '', '', ''
        session.layer = next(found for found in spectra if found.name == name)
        shown = maps.get('product', maps.get('output', next(iter(maps.values()))))
        title = f'{model.label}: {Path(session.picture.name).name}'
        session.layer_figures = [
            figures.draw_layers([session.layer], title),
            figures.draw_maps(maps, strongest_channels(shown, _MAPS), f'{title}, {name}'),
        ]
        texts = ('spectra', 'maps of the channels with the most energy, and their log-amplitude spectra')
        charts = [
            markup.chart(figures.figure_svg(figure), name=text)
            for text, figure in zip(texts, session.layer_figures, strict=True)]
        flag = ['--modules', name] if kind == 'module' else ['--gates', name, '--kinds', kind]
        line = self.about.command('layers', model.spec, '--image', session.picture.name, *flag, '--channels', 'all')
        return markup.layer_summary(session.layer), *charts, markup.command(line)

    def save_layer(self, session) -> list[dict[str, str]]:
        """The figures that are shown, the spectra, and the summary of the layer."""
        layer = session.layer
        return [] if layer is None else [
            *(_svg(f'{layer.name}-{name}', figure) for name, figure in zip(('spectra', 'maps'), session.layer_figures)),
            _csv(f'{layer.name}-spectra', layer.as_rows()), _csv(f'{layer.name}-summary', [layer.summary_row()])]

    def _number(self, label: str) -> int:
        labels = [model.label for model in self.about.models]
        if label not in labels:
            raise _refused('There is no such model.')
        return labels.index(label)


def _refused(reason: str) -> gr.Error:
    return gr.Error(reason, print_exception=False)


@contextlib.contextmanager
def _shown_errors() -> Iterator[None]:
    """Say on the page what a model cannot do."""
    try:
        yield
    except UserError as e:
        raise _refused(str(e)) from None


def _event_number(event: gr.EventData, name: str, largest: int) -> int:
    """A whole number from 0 to `largest` that a button sends."""
    text = str(event._data.get(name)) if isinstance(event._data, dict) else ''
    if not (text.isdecimal() and len(text) < 10 and int(text) <= largest):
        raise _refused('There is no such choice.')
    return int(text)


def _words(options: SplitOptions) -> list[str]:
    """Options of a split as on the command line."""
    words = ['--keep-dc'] if options.keep_dc else []
    words += ['--restore-contrast'] if options.restore_contrast else []
    return words + (['--split-space', options.space] if options.space != SplitOptions().space else [])


def _svg(name: str, figure: Any) -> dict[str, str]:
    return dict(name=f'{name}.svg', type='image/svg+xml', text=figures.figure_svg(figure))


def _csv(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    return dict(name=f'{name}.csv', type='text/csv', text=csv_text(rows))


_WELCOME = '<div class="welcome"><p>Drop a picture on the left, and move the radius.</p></div>'
_NO_PICTURE = markup.message('Choose a picture in the tab Image first.', 'note')
