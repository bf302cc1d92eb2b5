"""The page: its components, and what happens when a visitor touches one. Needs Gradio (extra `explore`)."""
import contextlib
import dataclasses
import functools
import html
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from gmnet_timm.errors import UserError
from gmnet_timm.frequency import plots
from gmnet_timm.frequency.answers import Change, ScanPoint, bisect_change, list_changes, scan_radii
from gmnet_timm.frequency.bands import Band, SplitOptions
from gmnet_timm.frequency.evaluation import band_curves, evaluate_models, kept_rows
from gmnet_timm.frequency.explore import markup
from gmnet_timm.frequency.explore.subjects import TOP, Data, Exploration, Picture, read_upload, shown_bands
from gmnet_timm.frequency.explore.turns import Polite
from gmnet_timm.frequency.reports import csv_text
from gmnet_timm.frequency.spectra import LayerSpectrum, layer_spectra, list_layers, strongest_channels
from gmnet_timm.frequency.split import check_corner, check_radii, largest_radius, radial_power_spectrum

__all__ = ['create_page', 'look_of_the_page']

_THUMBNAILS = 6
_MAPS = 8  # channels that are drawn
_BATCH_SIZE = 8  # of the background: short passes, so that a visitor does not wait long
_RADII = (2, 4, 8, 12, 18, 24, 36, 64)
_SECONDS = 1.  # between two drawings of a chart that grows
_SESSION_SECONDS = 3600
_FILE = Path(__file__)
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
    """What one visitor looks at. It is forgotten when the tab is closed."""

    def __init__(self) -> None:
        self.picture: Picture | None = None
        self.scans = 0  # the last one that was started; an older one stops
        self.points: list[list[ScanPoint]] = []
        self.layer: LayerSpectrum | None = None
        self.layer_figures: list[Any] = []
        self.first = 0  # of the thumbnails


def look_of_the_page() -> dict[str, Any]:
    """Arguments of Gradio's `launch` for the looks: fonts of the system, nothing from elsewhere."""
    fonts = ['system-ui', '-apple-system', 'Segoe UI', 'Roboto', 'Helvetica', 'Arial', 'sans-serif']
    theme = gr.themes.Base(
        primary_hue='sky', neutral_hue='slate', spacing_size='sm', radius_size='md', text_size='sm',
        font=[gr.themes.Font(name) for name in fonts],
        font_mono=[gr.themes.Font(name) for name in ('ui-monospace', 'Menlo', 'Consolas', 'monospace')])
    return dict(theme=theme, css_paths=[_FILE.with_name('page.css')], footer_links=[])


def create_page(about: Exploration) -> gr.Blocks:
    """Build the page.

    Args:
        about: Models and data.
    """
    return _Page(about).blocks


class _Page:
    def __init__(self, about: Exploration):
        self.about = about
        with gr.Blocks(
                title='gmnet-timm: what a model sees at each frequency', analytics_enabled=False,
                delete_cache=(60, 600), fill_width=True) as self.blocks:
            self.session = gr.State(Session(), time_to_live=_SESSION_SECONDS)
            names = ' · '.join(subject.label for subject in about.subjects)
            gr.HTML(f'<header><h1>What a model sees at each frequency</h1><p>{html.escape(names)}</p></header>')
            with gr.Tabs():
                with gr.Tab('Image'):
                    self._image_tab()
                with gr.Tab('Inside') as inside:
                    self._inside_tab(inside)
                if about.data is not None:
                    with gr.Tab('Accuracy') as accuracy:
                        self._accuracy_tab(accuracy)

    @property
    def data(self) -> Data:
        """The data, for what is only on the page where there is some."""
        assert self.about.data is not None
        return self.about.data

    def _on(self, event: Any, fn: Any, inputs: Sequence[Any] = (), outputs: Sequence[Any] = (), **kwargs: Any) -> Any:
        """Call `fn` on an event. Nothing is offered as an API."""
        return event(
            fn, list(inputs), list(outputs), api_visibility='private',
            **{'show_progress': 'hidden', 'trigger_mode': 'always_last', **kwargs})

    def _save_button(self, label: str, name: str, fn: Any, inputs: Sequence[Any]) -> None:
        """A button that hands the files of `fn` to the browser, without one on this machine."""
        files = gr.JSON(visible=False)
        button = gr.Button(label, size='sm', scale=0, elem_id=name)
        self._on(button.click, fn, inputs, [files]).then(None, [files], js=_DOWNLOAD)

    # --- image -------------------------------------------------------------------------------------------------------

    def _image_tab(self) -> None:
        about = self.about
        largest = about.largest_radius
        with gr.Row(elem_id='image'):
            with gr.Column(elem_id='controls', scale=0, min_width=300):
                self.file = gr.File(label='Picture', show_label=False, height=86, elem_id='file')
                self.message = gr.HTML(elem_id='message')
                if about.data is not None and about.data.count:
                    self.thumbnails = gr.HTML(js_on_load=_ON_CLICK, elem_id='thumbnails')
                self.radius = gr.Slider(
                    0, largest, min(12, largest), step=1, label='Radius (cycles per image)', elem_id='radius',
                    buttons=[])
                self.other = gr.Slider(
                    0, largest, min(36, largest), step=1, label='Second radius, for the band', elem_id='other',
                    buttons=[])
                with gr.Group(elem_id='options'):
                    self.keep_dc = gr.Checkbox(label='Keep the mean (DC) in band and high-pass', elem_id='keep-dc')
                    self.contrast = gr.Checkbox(label='Restore their contrast', elem_id='contrast')
                    self.space = gr.Radio(
                        ['normalized', 'pixels'], value='normalized', label='Split the values as', elem_id='space')
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
                    self._save_button('Pictures (SVG)', 'save-pictures', self.save_pictures, self.view)
                    self._save_button('Charts (SVG)', 'save-charts', self.save_charts, self.view)
                    self._save_button('Numbers (CSV)', 'save-numbers', self.save_numbers, self.view)
        self.moved = [self.cards, self.marks, self.command]
        for slider in (self.radius, self.other):
            self._on(slider.input, self.move, self.view, self.moved, queue=False)
        for option in options:
            self._scan_after(self._on(option.input, self.move, self.view, self.moved, queue=False))
        opened = [self.message, *self.moved, self.spectrum, self.scan, self.changes]
        self._scan_after(self._on(self.file.upload, self.upload, [self.file, *self.view], [self.file, *opened]))
        self._on(self.changes.select, self.jump, self.view, [self.radius, *self.moved], queue=False)
        if about.data is not None and about.data.count:
            self._scan_after(self._on(
                self.thumbnails.select, self.choose, self.view, [self.thumbnails, *opened]))
            self._scan_after(self._on(self.blocks.load, self.start, self.view, [self.thumbnails, *opened]))

    def _scan_after(self, event: Any) -> None:
        self._on(
            event.then, self.look_for_changes, self.view, [self.scan, self.changes], concurrency_limit=4,
            trigger_mode='multiple')

    def move(self, session, radius, other, keep_dc, contrast, space) -> tuple[Any, ...]:
        """The radii or an option have moved."""
        picture = session.picture
        if picture is None:
            return _WELCOME, '', ''
        options = SplitOptions(keep_dc, contrast, space)
        with self.about.turns.visitor():
            cards = markup.cards(picture, shown_bands(radius, other), options)
        marks = markup.mark_positions(self.about, radius, other)
        return cards, marks, self.image_command(picture, radius, other, options)

    def image_command(self, picture: Picture, radius: float, other: float, options: SplitOptions) -> str:
        """The commands that print the same."""
        radii = [f'{r:g}' for r in dict.fromkeys((radius, other))]
        bands = ['low', 'high', *(['band-pass'] if len(radii) > 1 else [])]
        lines = [
            self.about.command(
                'image', picture.name, '--model', subject.spec, *self.about.stated_names, '--radii', *radii, '--bands',
                *bands, '--top', TOP, *_words(options))
            for subject in self.about.subjects
        ]
        return markup.command('\n'.join(lines))

    def open(self, session: Session, read, *view: Any) -> tuple[Any, ...]:
        """Open a picture. What is wrong with it is said on the page, and the last one stays."""
        try:
            with self.about.turns.visitor():
                picture = read()
                session.picture, session.scans = picture, session.scans + 1
                session.points, session.layer = [], None
                spectrum = markup.spectrum_chart(picture)
            moved = self.move(session, *view)
        except UserError as e:
            return markup.message(str(e)), *[gr.skip()] * 6
        note = f'{Path(picture.name).name}, {picture.size[0]}×{picture.size[1]} pixels'
        return markup.message(note, 'note'), *moved, spectrum, '', ''

    def upload(self, path, session, *view: Any) -> tuple[Any, ...]:
        """A visitor has sent a file. It is read and removed."""
        if path is None:
            return (gr.skip(),) * 8
        try:
            opened = self.open(session, lambda: read_upload(path, self.about), *view)
        finally:
            shutil.rmtree(Path(path).parent, ignore_errors=True)  # a folder of its own in the folder for uploads
        return None, *opened

    def start(self, session, *view: Any) -> tuple[Any, ...]:
        """The page was opened: show the first of the data."""
        return self.thumbnails_of(session), *self._open_nth(session, 0, *view)

    def choose(self, session, radius, other, keep_dc, contrast, space, event: gr.EventData) -> tuple[Any, ...]:
        """A thumbnail was clicked."""
        if 'more' in event._data:
            session.first += 1
            return self.thumbnails_of(session), *[gr.skip()] * 7
        index = int(event._data['index'])
        if not 0 <= index < self.data.count:
            return (gr.skip(),) * 8
        return gr.skip(), *self._open_nth(session, index, radius, other, keep_dc, contrast, space)

    def _open_nth(self, session: Session, index: int, *view: Any) -> tuple[Any, ...]:
        data, most = self.data, self.about.max_pixels
        return self.open(
            session, lambda: self.about.open_picture(
                data.name(index), lambda channels: data.read(index, channels, most)), *view)

    def thumbnails_of(self, session: Session) -> str:
        """Some of the data."""
        return markup.thumbnails(self.data, session.first, _THUMBNAILS, self.about.subjects[0].channels)

    def jump(self, session, _radius, other, keep_dc, contrast, space, event: gr.EventData) -> tuple[Any, ...]:
        """A change of the answer was clicked: go to its radius."""
        radius = min(self.about.largest_radius, max(0, int(event._data['radius'])))
        return radius, *self.move(session, radius, other, keep_dc, contrast, space)

    def look_for_changes(self, session, radius, other, keep_dc, contrast, space) -> Iterator[tuple[Any, ...]]:
        """Bisect for a change of the answer, which is quick, then scan all radii, which finds the first."""
        picture, options, about = session.picture, SplitOptions(keep_dc, contrast, space), self.about
        if picture is None:
            return
        session.scans += 1
        this = session.scans
        models = [subject.loaded.model for subject in about.subjects]
        found: list[list[Change]] = [[] for _ in models]
        scanned = [False for _ in models]
        points: list[list[ScanPoint]] = [[] for _ in models]
        session.points = points
        for i, model in enumerate(models):
            for kind in ('low', 'high'):
                with about.turns.visitor():
                    change = bisect_change(model, picture.split(i, options), kind)
                found[i] += [change] if change is not None else []
        yield gr.skip(), markup.changes(about, found, scanned)
        for i, model in enumerate(models):
            scan = scan_radii(model, picture.split(i, options), batch_size=_BATCH_SIZE)
            drawn = time.monotonic()
            while (some := self._next(scan)) is not None:
                if session.scans != this:  # of another picture or with other options
                    return
                points[i] += some
                if time.monotonic() - drawn > _SECONDS:
                    drawn = time.monotonic()
                    yield markup.scan_charts(picture, points), gr.skip()
            largest = largest_radius(about.subjects[i].config['input_size'])
            found[i] = [change for kind in ('low', 'high') for change in list_changes(points[i], kind, largest)]
            scanned[i] = True
            yield markup.scan_charts(picture, points), markup.changes(about, found, scanned)

    def _next(self, scan: Iterator[Any]) -> Any:
        with self.about.turns.background():
            return next(scan, None)

    # --- saving ------------------------------------------------------------------------------------------------------

    def save_pictures(self, session, radius, other, keep_dc, contrast, space) -> list[dict[str, str]]:
        """The parts of the picture as figures, one per model, as `freq image` draws them."""
        if session.picture is None:
            return []
        picture, options, bands = session.picture, SplitOptions(keep_dc, contrast, space), shown_bands(radius, other)
        found = []
        for i, subject in enumerate(self.about.subjects):
            parts = [(band, picture.pixels(i, band, options)) for band in bands]
            title = f'{subject.label}: {Path(picture.name).name}, radii in cycles per image'
            figure = plots.draw_image_panel(parts, picture.answers(i, bands, options), title)
            found.append(_svg(f'{Path(picture.name).stem}-{subject.label}', figure))
        return found

    def save_charts(self, session, *_) -> list[dict[str, str]]:
        """The spectrum of the picture, and the confidence by radius as far as it is known."""
        if session.picture is None:
            return []
        stem = Path(session.picture.name).stem
        found = [_svg(f'{stem}-spectrum', plots.draw_image_spectrum(
            session.picture.pixels(0, Band('raw'), SplitOptions()), Path(session.picture.name).name))]
        points = {subject.label: scan for subject, scan in zip(self.about.subjects, session.points) if scan}
        if points:
            title = Path(session.picture.name).name
            found.append(_svg(f'{stem}-radii', plots.draw_scan(points, self.about.largest_radius, title)))
        return found

    def save_numbers(self, session, radius, other, keep_dc, contrast, space) -> list[dict[str, str]]:
        """What the models say of the parts, and of all radii as far as it is known."""
        if session.picture is None:
            return []
        stem = Path(session.picture.name).stem
        options = SplitOptions(keep_dc, contrast, space)
        found = [_csv(f'{stem}-answers', session.picture.rows(shown_bands(radius, other), options))]
        spectrum = radial_power_spectrum(session.picture.pixels(0, Band('raw'), SplitOptions())).mean(0).tolist()
        found.append(_csv(f'{stem}-spectrum', [dict(radius=k, power=power) for k, power in enumerate(spectrum)]))
        rows = [dict(model=subject.label, picture=session.picture.name, **point.as_row())
                for subject, points in zip(self.about.subjects, session.points) for point in points]
        return [*found, _csv(f'{stem}-radii', rows)] if rows else found

    # --- inside ------------------------------------------------------------------------------------------------------

    def _inside_tab(self, tab: Any) -> None:
        labels = [subject.label for subject in self.about.subjects]
        with gr.Row():
            self.model = gr.Dropdown(labels, value=labels[0], label='Model', elem_id='model', visible=len(labels) > 1)
            self.layer = gr.Dropdown(label='Layer: gates, activations read as gates, blocks', elem_id='layer')
        self.inside_message = gr.HTML(_NO_PICTURE, elem_id='inside-message')
        with gr.Row():
            self.layer_spectrum = gr.HTML(elem_id='layer-spectrum', min_width=300)
            self.layer_maps = gr.HTML(elem_id='layer-maps', min_width=300)
        with gr.Row(elem_classes='bottom'):
            self.layer_command = gr.HTML(elem_id='layer-command')
            self._save_button('Figures (SVG)', 'save-layer', self.save_layer_figures, [self.session])
            self._save_button('Numbers (CSV)', 'save-layer-numbers', self.save_layer_numbers, [self.session])
        inputs = [self.session, self.model, self.layer]
        outputs = [self.inside_message, self.layer_spectrum, self.layer_maps, self.layer_command]
        self._on(tab.select, self.list_layers, [self.session, self.model, self.layer], [self.layer]).then(
            self.look_inside, inputs, outputs, show_progress='minimal', api_visibility='private')
        self._on(self.model.input, self.list_layers, inputs, [self.layer]).then(
            self.look_inside, inputs, outputs, show_progress='minimal', api_visibility='private')
        self._on(self.layer.input, self.look_inside, inputs, outputs, show_progress='minimal')

    @functools.cache  # noqa: B019, the page lives as long as the process
    def layers_of(self, number: int) -> list[tuple[str, str]]:
        """Layers of a model that can be looked at."""
        subject = self.about.subjects[number]
        images = torch.zeros(2, *subject.config['input_size'], device=self.about.device)
        with self.about.turns.visitor():
            return list_layers(subject.loaded.model, images)

    def list_layers(self, session, label, layer) -> Any:
        """Fill the picker."""
        layers = self.layers_of(self._number(label))
        choices = [_layer_label(*entry) for entry in layers]
        return gr.Dropdown(choices, value=layer if layer in choices else next(iter(choices), None))

    def look_inside(self, session, label, layer) -> tuple[Any, ...]:
        """Spectra and maps of a layer for the picture."""
        number = self._number(label)
        names = {_layer_label(*entry): entry for entry in self.layers_of(number)}
        if session.picture is None or layer not in names:
            return _NO_PICTURE if session.picture is None else markup.message('This model has no layer with maps.'), \
                '', '', ''
        subject, image = self.about.subjects[number], session.picture.images[number]
        name, kind = names[layer]
        maps: dict[str, torch.Tensor] = {}
        chosen: dict[str, Any] = dict(modules=[name]) if kind == 'module' else dict(gates=[name], kinds=[kind])
        try:
            with self.about.turns.visitor():
                spectra = layer_spectra(
                    subject.loaded.model, [(image, torch.zeros(1))], **chosen, channels=None,
                    on_maps=lambda _, signal, x: maps.update({signal: x[0].cpu()}))
        except UserError as e:
            return markup.message(str(e)), '', '', ''
        session.layer = next(found for found in spectra if found.name == name)
        shown = maps.get('product', maps.get('output', next(iter(maps.values()))))
        title = f'{subject.label}: {Path(session.picture.name).name}'
        session.layer_figures = [
            plots.draw_layers([session.layer], title),
            plots.draw_maps(maps, strongest_channels(shown, _MAPS), f'{title}, {name}'),
        ]
        charts = [
            markup.chart(plots.figure_svg(figure), name=text)
            for text, figure in zip(('spectra', 'maps of the channels with the most energy'), session.layer_figures)]
        flag = ['--modules', name] if kind == 'module' else ['--gates', name, '--kinds', kind]
        line = self.about.command('layers', subject.spec, '--image', session.picture.name, *flag, '--channels', 'all')
        return markup.layer_summary(session.layer), *charts, markup.command(line)

    def save_layer_figures(self, session) -> list[dict[str, str]]:
        """The figures that are shown."""
        names = ('spectra', 'maps')
        return [] if session.layer is None else [
            _svg(f'{session.layer.name}-{name}', figure) for name, figure in zip(names, session.layer_figures)]

    def save_layer_numbers(self, session) -> list[dict[str, str]]:
        """The spectra, and the summary of the layer."""
        return [] if session.layer is None else [
            _csv(f'{session.layer.name}-spectra', session.layer.as_rows()),
            _csv(f'{session.layer.name}-summary', [session.layer.summary_row()])]

    def _number(self, label: str) -> int:
        return next((i for i, subject in enumerate(self.about.subjects) if subject.label == label), 0)

    # --- accuracy ----------------------------------------------------------------------------------------------------

    def _accuracy_tab(self, tab: Any) -> None:
        data, largest = self.data, self.about.largest_radius
        radii = ' '.join(str(r) for r in _RADII if r <= largest)
        with gr.Row():
            with gr.Column(scale=0, min_width=300):
                self.radii = gr.Textbox(radii, label='Radii (cycles per image)', elem_id='radii')
                self.count = gr.Number(
                    min(200, data.count or 200), label=f'Images, evenly spaced, of {data.count or "a stream"}',
                    precision=0, minimum=1, elem_id='num-images')
                with gr.Row():
                    run = gr.Button('Evaluate', variant='primary', size='sm', elem_id='run')
                    cancel = gr.Button('Stop', size='sm', elem_id='stop')
                self.progress = gr.HTML(elem_id='progress')
                gr.HTML(markup.message(data.note or f'Numbers are kept in {data.table}.', 'note'), elem_id='kept')
            with gr.Column(min_width=300):
                self.accuracies = gr.HTML(elem_id='accuracies')
        with gr.Row(elem_classes='bottom'):
            self.eval_command = gr.HTML(elem_id='eval-command')
            inputs = [self.radii, self.count, self.keep_dc, self.contrast, self.space]
            self._save_button('Figure (SVG)', 'save-accuracies', self.save_accuracies, inputs)
            self._save_button('Numbers (CSV)', 'save-accuracies-numbers', self.save_accuracy_numbers, inputs)
        timer = gr.Timer(.5, active=False)
        outputs = [self.progress, self.accuracies, self.eval_command, timer]
        self._on(run.click, self.evaluate, inputs, outputs)
        self._on(cancel.click, self.stop, inputs, outputs)
        self._on(timer.tick, self.accuracies_so_far, inputs, outputs)
        self._on(tab.select, self.accuracies_so_far, inputs, outputs)
        self._on(self.radii.submit, self.accuracies_so_far, inputs, outputs)

    def _settings(self, radii, count, keep_dc, contrast, space):
        try:
            numbers = [float(word) for word in radii.replace(',', ' ').split()]
        except ValueError as e:
            raise UserError(f'Radii are numbers with spaces between them, got {radii!r}.') from e
        check_radii(numbers)
        for subject in self.about.subjects:
            check_corner(numbers, subject.config['input_size'])
        if not count or count < 1:
            raise UserError('The number of images must be positive.')
        return self.data.settings(int(count), numbers, SplitOptions(keep_dc, contrast, space))

    def evaluate(self, *inputs: Any) -> tuple[Any, ...]:
        """Start to evaluate all models in the background."""
        about = self.about
        try:
            settings = self._settings(*inputs)
        except UserError as e:
            return markup.message(str(e)), gr.skip(), gr.skip(), gr.skip()
        polite = [
            dataclasses.replace(subject.loaded, model=Polite(subject.loaded.model, about.turns))
            for subject in about.subjects]

        def work(watch: Any) -> None:
            evaluate_models(
                polite, settings, self.data.table, again=True, device=about.device, batch_size=_BATCH_SIZE,
                workers=about.workers, watch=watch)

        about.job.start(work, lambda batches: batches * len(polite))
        return self.accuracies_so_far(*inputs)

    def stop(self, *inputs: Any) -> tuple[Any, ...]:
        """Stop the evaluation."""
        self.about.job.cancel()
        return self.accuracies_so_far(*inputs)

    def accuracies_so_far(self, *inputs: Any) -> tuple[Any, ...]:
        """How far it is, and what the table holds for these settings."""
        about = self.about
        bar = markup.progress_bar(about.job)
        timer = gr.Timer(active=about.job.state == 'running')
        try:
            settings = self._settings(*inputs)
        except UserError as e:
            return markup.message(str(e)), gr.skip(), gr.skip(), timer
        words = ['--radii', *(f'{r:g}' for r in settings.radii), '--num-images', settings.num_images,
                 *about.stated_data, *_words(settings.options)]
        line = about.command('eval', *(subject.spec for subject in about.subjects), *words)
        if about.job.state == 'running':
            return bar, gr.skip(), markup.command(line), timer
        figure = self._accuracy_figure(settings)
        if figure is None:
            chart = markup.message('There are no numbers for these settings yet: Evaluate computes them.', 'note')
        else:
            chart = markup.chart(plots.figure_svg(figure), name='accuracy by radius, on the data')
        return bar, chart, markup.command(line), timer

    def _accuracy_rows(self, settings) -> dict[str, list[dict[str, str]]]:
        found = {subject.label: kept_rows([subject.loaded], settings, self.data.table)
                 for subject in self.about.subjects}
        return {label: rows for label, rows in found.items() if rows}

    def _accuracy_figure(self, settings) -> Any:
        rows = self._accuracy_rows(settings)
        if not rows:
            return None
        count = next(iter(rows.values()))[0]['count']
        classes = {row['num_classes'] for mine in rows.values() for row in mine}
        chance = 100 / int(classes.pop()) if len(classes) == 1 and '' not in classes else None
        return plots.draw_band_accuracy(band_curves(rows), f'{count} images, bars: 95 % intervals', chance)

    def save_accuracies(self, *inputs: Any) -> list[dict[str, str]]:
        """The figure that is shown."""
        with contextlib.suppress(UserError):
            figure = self._accuracy_figure(self._settings(*inputs))
            return [] if figure is None else [_svg('accuracy', figure)]
        return []

    def save_accuracy_numbers(self, *inputs: Any) -> list[dict[str, str]]:
        """The rows of the table that are shown."""
        with contextlib.suppress(UserError):
            rows = [row for mine in self._accuracy_rows(self._settings(*inputs)).values() for row in mine]
            return [_csv('accuracy', rows)] if rows else []
        return []


def _words(options: SplitOptions) -> list[str]:
    """Options of a split as on the command line."""
    words = ['--keep-dc'] if options.keep_dc else []
    words += ['--restore-contrast'] if options.restore_contrast else []
    return words + (['--split-space', options.space] if options.space != SplitOptions().space else [])


def _layer_label(name: str, kind: str) -> str:
    return f'{name or "the model itself"} ({"block" if kind == "module" else kind})'


def _svg(name: str, figure: Any) -> dict[str, str]:
    return dict(name=f'{name}.svg', type='image/svg+xml', text=plots.figure_svg(figure))


def _csv(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    return dict(name=f'{name}.csv', type='text/csv', text=csv_text(rows))


_WELCOME = '<div class="welcome"><p>Drop a picture on the left, and move the radius.</p></div>'
_NO_PICTURE = markup.message('Choose a picture in the tab Image first.', 'note')
