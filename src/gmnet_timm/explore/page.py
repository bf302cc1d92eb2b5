"""The page: its components, and what happens when a visitor touches one. Needs Gradio (extra `explore`).

Whatever a request holds comes from outside: it chooses among what is there, and never names a file to write or delete.
Gradio keeps uploads in its own folder, and removes them by its own `delete_cache`.
"""
import functools
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gradio as gr
import torch
from gradio.utils import get_upload_folder

from gmnet_timm.errors import UserError
from gmnet_timm.explore import markup
from gmnet_timm.explore.pictures import TOP, Exploration, Picture, read_upload, shown_bands
from gmnet_timm.frequency import figures
from gmnet_timm.frequency.bands import SPACES, SplitOptions
from gmnet_timm.frequency.data import read_picture
from gmnet_timm.frequency.spectra import layer_spectra, list_layers, strongest_channels
from gmnet_timm.frequency.split import default_radii

__all__ = ['Page', 'look_of_the_page']

_THUMBNAILS = 6
_MAPS = 8  # channels that are drawn
_KINDS = ('gate', 'activation', 'module')  # of layers, what the page is about first
_PICTURE_SECONDS = 3600  # it is forgotten an hour after it was opened
_CACHE_SECONDS = (60, 600)  # Gradio removes an upload that is older than the second, and looks every first
_ON_CLICK = '''element.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (button) trigger('select', {...button.dataset});
});'''

with mock.patch('gradio.component_meta.create_or_modify_pyi'):  # writes a file beside the source of a component
    class _Upload(gr.File):
        """Where a picture is dropped. Gives its name and its bytes, and nothing that is not an upload."""

        is_template = True  # in the browser it is a gr.File

        async def async_move_resource_to_block_cache(self, url_or_file_path):
            # Gradio downloads what is an address, and remembers any path of a request in order to delete it later.
            self._read(str(url_or_file_path))
            return await super().async_move_resource_to_block_cache(url_or_file_path)

        def preprocess(self, payload: Any) -> Any:
            return None if payload is None else self._read(payload.path)

        def _read(self, path: str) -> tuple[str, bytes]:
            try:
                return read_upload(path, get_upload_folder())
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
            self.picture = gr.State(time_to_live=_PICTURE_SECONDS)
            names = ' · '.join(model.label for model in about.models)
            gr.HTML(f'<header><h1>What a model sees at each frequency</h1><p>{html.escape(names)}</p></header>')
            with gr.Tabs():
                with gr.Tab('Image'):
                    self._image_tab()
                with gr.Tab('Inside') as inside:
                    self._inside_tab(inside)

    def _on(self, event: Any, fn: Any, inputs: Sequence[Any] = (), outputs: Sequence[Any] = (), **kwargs: Any) -> Any:
        """Call `fn` on an event. Nothing is offered as an API."""
        return event(
            fn, list(inputs), list(outputs), api_visibility='private',
            **{'show_progress': 'hidden', 'trigger_mode': 'always_last', **kwargs})

    # --- image -------------------------------------------------------------------------------------------------------

    def _image_tab(self) -> None:
        largest = self.about.largest_radius
        first, second = default_radii([model.config['input_size'] for model in self.about.models])
        with gr.Row(elem_id='image'):
            with gr.Column(elem_id='controls', scale=0, min_width=300):
                file = _Upload(label='Picture', show_label=False, height=86, elem_id='file')
                message = gr.HTML(elem_id='message')
                thumbnails = gr.HTML(js_on_load=_ON_CLICK, elem_id='thumbnails')
                radius, other = (
                    gr.Slider(0, largest, value, step=1, label=label, elem_id=name, buttons=[])
                    for name, value, label in (
                        ('radius', first, 'Radius (cycles per image)'),
                        ('other', second, 'Second radius, for the band')))
                with gr.Group(elem_id='options'):
                    options: list[Any] = [
                        gr.Checkbox(label='Keep the mean (DC) in band and high-pass', elem_id='keep-dc'),
                        gr.Checkbox(label='Restore their contrast', elem_id='contrast'),
                        gr.Radio(list(SPACES), value=SPACES[0], label='Split the values as', elem_id='space')]
            with gr.Column(elem_id='view', min_width=300):
                cards = gr.HTML(_WELCOME, elem_id='cards')
                spectrum = gr.HTML(elem_id='spectrum')
                marks = gr.HTML(elem_id='marks')
                command = gr.HTML(elem_id='command')
        view = [self.picture, radius, other, *options]
        moved = [cards, marks, command]
        # A number that is typed beside a slider can be out of range: it is corrected in the browser, before it is sent.
        inside = f'(x) => Math.min({largest}, Math.max(0, Math.round(x ?? 0)))'
        for slider in (radius, other):
            slider.input(None, [slider], [slider], js=f'(x) => x === null ? x : ({inside})(x)')
            self._on(
                slider.input, self.move, view, moved, queue=False,
                js=f'(p, r, o, ...options) => [p, ({inside})(r), ({inside})(o), ...options]')
        for option in options:
            self._on(option.input, self.move, view, moved, queue=False)
        opened = [self.picture, message, *moved, spectrum]
        self._on(file.upload, self.upload, [file, *view], [file, *opened])
        if self.about.images is not None and self.about.images.count:
            self._on(thumbnails.select, self.choose, view, opened)
            self._on(self.blocks.load, self.start, view, [thumbnails, *opened])

    def move(self, picture: Picture | None, *view: Any) -> tuple[str, str, str]:
        """The radii or an option have moved. The page itself sends none that are refused here."""
        *radii, keep_dc, contrast, space = view
        largest = self.about.largest_radius
        if not all(isinstance(r, (int, float)) and 0 <= r <= largest for r in radii):
            raise _refused(f'A radius is a number from 0 to {largest} cycles per image.')
        if not (isinstance(keep_dc, bool) and isinstance(contrast, bool) and space in SPACES):
            raise _refused('There is no such option.')
        if picture is None:
            return _WELCOME, '', ''
        radius, other = map(round, radii)
        options = SplitOptions(keep_dc, contrast, space)
        try:
            with self.about.lock:
                cards = markup.cards(picture, shown_bands(radius, other), options)
        except UserError as e:
            raise _refused(str(e)) from None
        marks = markup.mark_positions(picture, radius, other)
        return cards, marks, self._image_command(picture, radius, other, options)

    def _image_command(self, picture: Picture, radius: int, other: int, options: SplitOptions) -> str:
        """The commands that print the same."""
        words = ['--radii', *dict.fromkeys((radius, other)), '--bands', 'low', 'high']
        words += ['band-pass'] if radius != other else []
        words += ['--keep-dc'] if options.keep_dc else []
        words += ['--restore-contrast'] if options.restore_contrast else []
        words += ['--split-space', options.space] if options.space != SPACES[0] else []
        return markup.command('\n'.join(
            self.about.command(
                'image', picture.name, '--model', model.spec, *self.about.stated_names, '--top', TOP, *words)
            for model in self.about.models))

    def open(self, name: str, read: Any, picture: Picture | None, *view: Any) -> tuple[Any, ...]:
        """Open a picture. What is wrong with it is said on the page, and the last one stays.

        The picture is an output too: Gradio counts a state's time to live from when it last was one.
        """
        self.move(None, *view)
        try:
            with self.about.lock:
                picture = self.about.open_picture(name, read)
                spectrum = markup.spectrum_chart(picture)
        except UserError as e:
            return gr.skip(), markup.message(str(e)), *[gr.skip()] * 4
        note = f'{Path(picture.name).name}, {picture.size[0]}×{picture.size[1]} pixels'
        return picture, markup.message(note, 'note'), *self.move(picture, *view), spectrum

    def upload(self, file: tuple[str, bytes] | None, *view: Any) -> tuple[Any, ...]:
        """A visitor has sent a file."""
        if file is None:
            return (gr.skip(),) * 7
        name, content = file
        return None, *self.open(name, lambda channels: read_picture(content, channels, name=name), *view)

    def start(self, *view: Any) -> tuple[Any, ...]:
        """The page was opened: show the first of the images."""
        assert self.about.images is not None
        thumbnails = markup.thumbnails(self.about.images, _THUMBNAILS, self.about.models[0].channels)
        return thumbnails, *self._open_nth(0, *view)

    def choose(self, picture, radius, other, keep_dc, contrast, space, event: gr.EventData) -> tuple[Any, ...]:
        """A thumbnail was clicked."""
        assert self.about.images is not None
        text = str(event._data.get('index')) if isinstance(event._data, dict) else ''
        if not (text.isdecimal() and len(text) < 10 and int(text) < self.about.images.count):
            raise _refused('There is no such image.')
        return self._open_nth(int(text), picture, radius, other, keep_dc, contrast, space)

    def _open_nth(self, index: int, *view: Any) -> tuple[Any, ...]:
        images = self.about.images
        assert images is not None
        return self.open(images.name(index), lambda channels: images.read(index, channels), *view)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _inside_tab(self, tab: Any) -> None:
        labels = [model.label for model in self.about.models]
        with gr.Row():
            model = gr.Dropdown(labels, value=labels[0], label='Model', elem_id='model', visible=len(labels) > 1)
            layer = gr.Dropdown(label='Layer: gates, activations read as gates, blocks', elem_id='layer')
        message = gr.HTML(_NO_PICTURE, elem_id='inside-message')
        with gr.Row(elem_id='inside'):
            spectrum = gr.HTML(elem_id='layer-spectrum', min_width=300)
            maps = gr.HTML(elem_id='layer-maps', min_width=300)
        command = gr.HTML(elem_id='layer-command')
        look: dict[str, Any] = dict(
            fn=self.look_inside, inputs=[self.picture, model, layer], outputs=[message, spectrum, maps, command],
            show_progress='minimal')
        for event in (tab.select, model.input):
            self._on(self._on(event, self.list_layers, [model, layer], [layer]).then, **look)
        self._on(layer.input, **look)

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

    def look_inside(self, picture: Picture | None, label, layer) -> tuple[str, str, str, str]:
        """Spectra and maps of a layer for the picture."""
        number = self._number(label)
        layers = self.layers_of(number)
        if picture is None:
            return _NO_PICTURE, '', '', ''
        if layer is None and not layers:
            return markup.message('This model has no layer with maps.'), '', '', ''
        if layer not in layers:
            raise _refused('The model has no such layer.')
        model, (name, kind) = self.about.models[number], layers[layer]
        maps: dict[str, torch.Tensor] = {}
        chosen: dict[str, Any] = dict(modules=[name]) if kind == 'module' else dict(gates=[name], kinds=[kind])
        try:
            with self.about.lock:
                spectra = layer_spectra(
                    model.loaded.model, [(picture.images[number], torch.zeros(1))], **chosen, channels=None,
                    on_maps=lambda _, signal, x: maps.update({signal: x[0].cpu()}))
        except UserError as e:
            return markup.message(str(e)), '', '', ''
        found = next(spectrum for spectrum in spectra if spectrum.name == name)
        shown = maps.get('product', maps.get('output', next(iter(maps.values()))))
        title = f'{model.label}: {Path(picture.name).name}'
        drawn = figures.draw_maps(maps, strongest_channels(shown, _MAPS), f'{title}, {name}')
        flag = ['--modules', name] if kind == 'module' else ['--gates', name, '--kinds', kind]
        command = self.about.command('layers', model.spec, '--image', picture.name, *flag, '--channels', 'all')
        return (
            markup.layer_summary(found), markup.chart(figures.draw_layers([found], title), name='spectra'),
            markup.chart(drawn, name='maps of the channels with the most energy, and their log-amplitude spectra'),
            markup.command(command))

    def _number(self, label: str) -> int:
        labels = [model.label for model in self.about.models]
        if label not in labels:
            raise _refused('There is no such model.')
        return labels.index(label)


def _refused(reason: str) -> gr.Error:
    return gr.Error(reason, print_exception=False)


_WELCOME = '<div class="welcome"><p>Drop a picture on the left, and move the radius.</p></div>'
_NO_PICTURE = markup.message('Choose a picture in the tab Image first.', 'note')
