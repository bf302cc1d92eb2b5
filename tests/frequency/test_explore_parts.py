"""What the page of `freq explore` is made of, without a browser: pictures, turns, the job in the background, markup."""
import dataclasses
import importlib.util
import runpy
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from gmnet_timm.cli.main import build_parser, main
from gmnet_timm.cli.options import stated_words
from gmnet_timm.errors import UserError
from gmnet_timm.frequency.answers import Change
from gmnet_timm.frequency.bands import SplitOptions
from gmnet_timm.frequency.evaluation import evaluate_models, kept_rows
from gmnet_timm.frequency.explore import markup, server, subjects
from gmnet_timm.frequency.explore.subjects import Data, Exploration, Subject, read_upload, shown_bands
from gmnet_timm.frequency.explore.turns import Job, Polite, Turns
from gmnet_timm.source import load_model

SPACE = Path(__file__).parents[2] / 'examples' / 'space'
NAMES = ['<b>a</b>', 'b']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('parts')
    rng = np.random.default_rng(0)
    for label in 'ab':
        (root / 'data' / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(root / 'data' / label / f'{i}.png')
    torch.manual_seed(0)
    for name, chans in (('test_vit', 3), ('test_resnet', 1)):
        torch.save(timm.create_model(name, num_classes=2, in_chans=chans).state_dict(), root / f'{name}.pth')
    (root / 'names.txt').write_text('\n'.join(NAMES))
    return root


@pytest.fixture
def about(folder):
    models = [load_model(f'test_vit={folder}/test_vit.pth'),
              load_model(f'test_resnet={folder}/test_resnet.pth', model_kwargs={'in_chans': 1})]
    return Exploration(
        tuple(Subject(model.name.split()[0], model.name, model, NAMES) for model in models),
        Data(str(folder / 'data'), split='.'))


def test_a_picture_gets_the_answers_that_freq_image_prints(about, folder, tmp_path, capsys):
    file = folder / 'data' / 'a' / '0.png'
    picture = read_upload(str(file), about)
    options = SplitOptions(restore_contrast=True, space='pixels')
    rows = [row for row in picture.rows(shown_bands(5, 20), options) if row['model'] == 'test_vit']
    found = {}
    for row in rows:
        radius = f'{row["inner_radius"]}-{row["radius"]}'.strip('-')
        head = f'{row["band"]} r = {radius}' if radius else row['band']
        found.setdefault(head, []).append(f'{row["answer"]} {100 * row["confidence"]:.1f} %')
    capsys.readouterr()
    assert main([
        'freq', 'image', str(file), '--model', f'test_vit={folder}/test_vit.pth', '--class-names',
        str(folder / 'names.txt'), '--radii', '5', '20', '--bands', 'low', 'high', 'band-pass', '--restore-contrast',
        '--split-space', 'pixels', '--output', str(tmp_path)]) == 0
    printed = {' '.join(line.split()) for line in capsys.readouterr().out.splitlines()[:6]}  # low and high of 20 too
    assert len(found) == 4 and {f'{head} {", ".join(lines)}' for head, lines in found.items()} < printed


def test_models_that_prepare_images_alike_share_a_picture(about):
    assert about.groups() == [[0], [1]]  # colour and grey
    twice = dataclasses.replace(about, subjects=(about.subjects[0], *about.subjects))
    assert twice.groups() == [[0, 1], [2]] and twice.largest_radius == about.largest_radius == 113
    picture = twice.open_picture('x', lambda channels: twice.data.read(0, channels))
    assert picture.images[0] is picture.images[1] and picture.images[2].shape[1] == 1


def test_a_part_is_asked_about_once(about, monkeypatch):
    asked = []
    ask = subjects.confidences
    monkeypatch.setattr(subjects, 'confidences', lambda m, s, bands: asked.append(list(bands)) or ask(m, s, bands))
    picture = about.open_picture('x', lambda channels: about.data.read(0, channels))
    first = picture.answers(0, shown_bands(5, 20), SplitOptions())
    assert picture.answers(0, shown_bands(5, 20), SplitOptions()) == first and len(asked) == 1
    picture.answers(0, shown_bands(5, 21), SplitOptions())
    assert [str(band) for band in asked[1]] == ['band-pass 5-21']  # only what is new


def test_bands_of_two_radii_in_any_order():
    assert [str(band) for band in shown_bands(12, 5)] == ['raw', 'low 12', 'band-pass 5-12', 'high 12']
    assert [str(band) for band in shown_bands(5, 5)] == ['raw', 'low 5', 'high 5']


def test_uploads_are_bounded(about, tmp_path):
    small = dataclasses.replace(about, max_bytes=1000, max_pixels=100)
    (tmp_path / 'a.png').write_bytes(bytes(2000))
    with pytest.raises(UserError, match='a.png has 0.002 MB, at most 0.001 MB'):
        read_upload(str(tmp_path / 'a.png'), small)
    Image.new('L', (11, 10)).save(tmp_path / 'b.png')
    with pytest.raises(UserError, match='b.png has 11x10 pixels'):
        read_upload(str(tmp_path / 'b.png'), small)


def test_names_are_escaped(about):
    picture = about.open_picture('<img src=x>', lambda channels: about.data.read(0, channels))
    html = markup.cards(picture, shown_bands(5, 20), SplitOptions())
    html += markup.changes(about, [[Change('low', 3, 0, 1, True)], []], [True, True]) + markup.message('<script>')
    html += markup.thumbnails(about.data, 0, 4, 3) + markup.command('<x>')
    assert '&lt;b&gt;a' in html and '<b>a</b>' not in html and '<script' not in html and '<img src=x' not in html


@pytest.mark.parametrize('scanned, found, text', [
    (False, [], 'none found by bisection'), (True, [], 'no change at any whole radius'),
    (False, [Change('low', 3, 0, 1, False)], 'found by bisection; the first one follows'),
    (True, [Change('low', 9, 0, 1, True)], 'the only change'),
    (True, [Change('low', 9, 0, 1, True), Change('low', 3, 1, 0, False)], 'and 1 more change beyond')])
def test_the_page_says_how_a_change_was_found(about, scanned, found, text):
    assert text in markup.changes(about, [found, []], [scanned, True])


# --- the background --------------------------------------------------------------------------------------------------


def test_a_visitor_goes_before_the_background(monkeypatch):
    from gmnet_timm.frequency.explore import turns as module
    monkeypatch.setattr(module, '_QUIET', .05)
    turns, order = Turns(), []

    def work(kind, name):
        with getattr(turns, kind)():
            order.append(name)
            time.sleep(.05)

    with turns.visitor():
        threads = [threading.Thread(target=work, args=args) for args in (
            ('background', 'b1'), ('background', 'b2'), ('visitor', 'v'))]
        for thread in threads:
            thread.start()
            time.sleep(.05)
    for thread in threads:
        thread.join()
    assert order[0] == 'v' and sorted(order) == ['b1', 'b2', 'v']


def test_a_job_counts_stops_and_says_why_it_failed():
    job = Job()
    at_second, go_on = threading.Event(), threading.Event()

    def batches():
        yield 1
        at_second.set()
        go_on.wait(10)
        yield 2
        yield 3

    class Loader:
        __len__ = lambda self: 3  # noqa: E731
        __iter__ = lambda self: batches()  # noqa: E731

    seen = []
    assert job.start(lambda watch: seen.extend(watch(Loader())), lambda n: 2 * n)
    at_second.wait(10)
    assert not job.start(print, len) and (job.state, job.done, job.total) == ('running', 1, 6)
    job.cancel()
    go_on.set()
    job.wait()
    assert job.state == 'stopped' and seen == [1, 2]

    def fail(watch):
        raise UserError('no such folder')

    assert job.start(fail, int)
    job.wait()
    assert (job.state, job.error) == ('failed', 'no such folder')
    assert 'no such folder' in markup.progress_bar(job)


def test_accuracies_are_kept_beside_the_data(about, folder):
    table = folder / 'data' / subjects.TABLE
    assert about.data.table == table and not about.data.note
    model = dataclasses.replace(about.subjects[0].loaded)
    settings = about.data.settings(6, [3, 9], SplitOptions())
    passes = []

    def watch(loader):
        passes.append(len(loader))
        return loader

    polite = dataclasses.replace(model, model=Polite(model.model, about.turns))
    rows = evaluate_models([polite], settings, table, workers=0, batch_size=2, watch=watch)
    assert [row['band'] for row in rows] == ['raw', 'low', 'high', 'low', 'high']
    assert {row['count'] for row in rows} == {'6'}
    assert evaluate_models([model], settings, table, workers=0, watch=watch) == rows and passes == [3]
    assert evaluate_models([model], settings, table, workers=0, again=True, watch=watch) == rows and len(passes) == 2
    other = about.data.settings(6, [4], SplitOptions())
    assert kept_rows([model], other, table) == []
    assert len(evaluate_models([model], other, table, workers=0)) == 3 and kept_rows([model], settings, table) == rows

    def stop(loader):
        for batch in loader:
            yield batch
            raise KeyboardInterrupt

    before = table.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        evaluate_models([model], settings, table, workers=0, batch_size=2, again=True, watch=stop)
    assert table.read_bytes() == before
    assert list(Data(str(folder / 'data'), split='.').images.reader.class_to_idx) == ['a', 'b']  # the table is no image


def test_a_folder_that_cannot_be_written_is_said(folder, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(subjects.tempfile, 'TemporaryFile', refuse)
    data = Data(str(folder / 'data'), split='.')
    assert 'cannot be written (Permission denied)' in data.note and data.table.parent != folder / 'data'
    assert data.table.parent.is_dir()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('words', [
    [], ['--no-ema', '--gp', 'max'], ['--model-kwargs', 'act_layer=gelu', 'in_chans=1', '--checkpoint', 'last.pth.tar'],
    ['--img-size', '96', '--crop-pct', '0.9', '--mean', '0.5', '0.4', '0.3', '--std', '0.2']])
def test_options_of_a_command_can_be_said_again(words):
    def parsed(words):
        args = vars(build_parser().parse_args(['freq', 'explore', 'm', *words]))
        return {name: value for name, value in args.items() if name != 'run'}

    again = stated_words(build_parser().parse_args(['freq', 'explore', 'm', *words]))
    assert parsed(again) == parsed(words) and bool(again) == bool(words)


def test_a_port_that_is_taken_is_said(about):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f'Cannot listen on 127.0.0.1, port {port}.*--port'), \
                server.serving(about, port=port):
            pass
    with pytest.raises(UserError, match='Cannot listen on 203.0.113.1'), server.serving(about, host='203.0.113.1'):
        pass


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'gradio' else find(name, *a))
    assert main(['freq', 'explore', 'gmnet_s1']) == 3
    assert "gmnet-timm[explore]" in capsys.readouterr().err


def test_the_space_is_the_same_page(monkeypatch):
    called = []
    monkeypatch.setattr('gmnet_timm.cli.main.main', lambda argv: called.append(argv) or 0)
    monkeypatch.setenv('MODELS', 'hf-hub:a/b hf-hub:c/d')
    with pytest.raises(SystemExit, match='^0$'):
        runpy.run_path(str(SPACE / 'app.py'), run_name='__main__')
    args = build_parser().parse_args(called[0])
    assert args.models == ['hf-hub:a/b', 'hf-hub:c/d'] and (args.host, args.port) == ('0.0.0.0', 7860)
    header = yaml.safe_load((SPACE / 'README.md').read_text().split('---')[1])
    assert header['sdk'] == 'gradio' and (SPACE / header['app_file']).is_file()
    assert len(header['short_description']) <= 60  # more is refused
    assert (SPACE / 'requirements.txt').read_text() == 'gmnet-timm[explore]\n'
