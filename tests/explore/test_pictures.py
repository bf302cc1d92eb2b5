"""What the page of `freq explore` is made of, without a browser: pictures, uploads, markup, the command."""
import dataclasses
import importlib.util
import runpy
import socket
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
from gmnet_timm.explore import markup, pictures, server
from gmnet_timm.explore.pictures import Exploration, Images, ShownModel, read_upload, shown_bands
from gmnet_timm.frequency.bands import SplitOptions
from gmnet_timm.frequency.data import prepare_picture, read_picture
from gmnet_timm.weights.model import load_model

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
        tuple(ShownModel(model.name.split()[0], model.name, model, NAMES) for model in models),
        Images(str(folder / 'data'), split='.'))


def test_a_picture_gets_the_answers_that_freq_image_prints(about, folder, tmp_path, capsys):
    file = folder / 'data' / 'a' / '0.png'
    picture = about.open_picture(str(file), lambda channels: read_picture(file, channels))
    options = SplitOptions(restore_contrast=True, space='pixels')
    bands = shown_bands(5, 20)
    found = {
        str(band).replace(' ', ' r = '): [f'{name} {100 * p:.1f} %' for name, p in answers]
        for band, answers in zip(bands, picture.answers(0, bands, options), strict=True)}
    capsys.readouterr()
    assert main([
        'freq', 'image', str(file), '--model', f'test_vit={folder}/test_vit.pth', '--class-names',
        str(folder / 'names.txt'), '--radii', '5', '20', '--bands', 'low', 'high', 'band-pass', '--restore-contrast',
        '--split-space', 'pixels', '--output', str(tmp_path)]) == 0
    printed = {' '.join(line.split()) for line in capsys.readouterr().out.splitlines()[:6]}  # low and high of 20 too
    assert len(found) == 4 and {f'{head} {", ".join(lines)}' for head, lines in found.items()} < printed


def test_models_that_prepare_images_alike_share_a_picture(about):
    assert about.groups() == [[0], [1]]  # colour and grey
    twice = dataclasses.replace(about, models=(about.models[0], *about.models))
    assert twice.groups() == [[0, 1], [2]] and twice.largest_radius == about.largest_radius == 113
    picture = twice.open_picture('x', lambda channels: twice.images.read(0, channels))
    assert picture.images[0] is picture.images[1] and picture.images[2].shape[1] == 1


def test_a_part_is_asked_about_once(about, monkeypatch):
    asked = []
    ask = pictures.confidences
    monkeypatch.setattr(pictures, 'confidences', lambda m, s, bands: asked.append(list(bands)) or ask(m, s, bands))
    picture = about.open_picture('x', lambda channels: about.images.read(0, channels))
    first = picture.answers(0, shown_bands(5, 20), SplitOptions())
    assert picture.answers(0, shown_bands(5, 20), SplitOptions()) == first and len(asked) == 1
    picture.answers(0, shown_bands(5, 21), SplitOptions())
    assert [str(band) for band in asked[1]] == ['band-pass 5-21']  # only what is new


def test_bands_of_two_radii_in_any_order():
    assert [str(band) for band in shown_bands(12, 5)] == ['raw', 'low 12', 'band-pass 5-12', 'high 12']
    assert [str(band) for band in shown_bands(5, 5)] == ['raw', 'low 5', 'high 5']


def test_only_uploads_are_read(tmp_path):
    uploads, name = tmp_path / 'uploads', 'a.png'
    for folder in (uploads / 'hash', uploads / 'other', tmp_path / 'elsewhere' / 'hash'):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b'x' * 10)
    (uploads / 'hash' / 'link').symlink_to(tmp_path / 'elsewhere' / 'hash' / name)
    (uploads / 'linked').symlink_to(tmp_path / 'elsewhere' / 'hash')
    assert read_upload(str(uploads / 'hash' / name), str(uploads), 10) == (name, b'x' * 10)
    for path in (
            uploads, uploads / 'hash', uploads / 'hash' / 'none.png', tmp_path / 'elsewhere' / 'hash' / name,
            uploads / 'hash' / 'link', uploads / 'linked' / name, uploads / '..' / 'elsewhere' / 'hash' / name, ''):
        with pytest.raises(UserError, match='not an uploaded picture'):
            read_upload(str(path), str(uploads), 10)
    with pytest.raises(UserError, match='a.png is too large'):
        read_upload(str(uploads / 'hash' / name), str(uploads), 9)


@pytest.mark.parametrize('size', [(1, 10_000), (49_000_000, 1), (3000, 1)])
def test_a_thin_picture_is_bounded_as_it_is_resized(size):
    config = dict(input_size=(3, 224, 224), crop_pct=.875, crop_mode='center', interpolation='bicubic')
    with pytest.raises(UserError, match='too narrow'):
        prepare_picture(Image.new('L', size), config)


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path):
    Image.new('1', (10_000, 10_000)).save(tmp_path / 'huge.png')
    np.save(tmp_path / 'huge.npy', np.zeros((1, 60_000_000, 1), np.uint8))
    for name, channels in (('huge.png', 3), ('huge.npy', 1)):
        with pytest.raises(UserError, match=f'{name} has .* million'):
            read_picture(tmp_path / name, channels)
    (tmp_path / 'lie.npy').write_bytes(  # says that it holds a terabyte
        b'\x93NUMPY\x01\x00v\x00'
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 1), }".ljust(117) + b'\n')
    with pytest.raises(UserError, match='million'):
        read_picture(tmp_path / 'lie.npy', 1)


def test_other_formats_and_pickles_are_refused(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.eps')  # which PIL hands to Ghostscript
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.gif')
    np.save(tmp_path / 'a.npy', np.array([{}]), allow_pickle=True)
    for name in ('a.eps', 'a.gif', 'a.npy'):
        with pytest.raises(UserError):
            read_picture(tmp_path / name, 3)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
def test_pictures_are_upright(tmp_path, orientation, suffix):
    """Compared with what each orientation means: EXIF 2.32, tag 0x0112, where row 0 and column 0 of the pixels are."""
    upright = np.zeros((6, 9), np.uint8)
    upright[0, 0] = 255
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: np.rot90(upright.T, 2), 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f'a.{suffix}'
    options = dict(lossless=True) if suffix == 'webp' else dict(quality=100) if suffix == 'jpg' else {}
    Image.fromarray(np.ascontiguousarray(turned)).convert('RGB').save(file, exif=exif, **options)
    read = np.asarray(read_picture(file, 1)).astype(int)
    assert read.shape == (6, 9) and read[0, 0] > 150 and read[5, 8] < 80


def test_names_are_escaped(about):
    picture = about.open_picture('<img src=x>', lambda channels: about.images.read(0, channels))
    html = markup.cards(picture, shown_bands(5, 20), SplitOptions())
    html += markup.message('<script>')
    html += markup.thumbnails(about.images, 4, 3) + markup.command('<x>')
    assert '&lt;b&gt;a' in html and '<b>a</b>' not in html and '<script' not in html and '<img src=x' not in html


def test_marks_are_where_the_radii_are_on_the_axis(about, monkeypatch):
    """The axis is matplotlib's, the marks are placed by a formula: compared with where matplotlib draws."""
    drawn = []
    monkeypatch.setattr(markup, 'chart', lambda figure, *_: drawn.append(figure))
    picture = about.open_picture('x', lambda channels: about.images.read(0, channels))
    markup.spectrum_chart(picture)
    (axis,) = drawn[0].axes
    style = markup.mark_positions(picture, 20, 5)
    for name, radius in (('start', 0), ('radius', 20), ('inner', 5), ('outer', 20), ('end', axis.get_xlim()[1])):
        place = axis.transData.transform((radius, 1))[0] / drawn[0].bbox.width
        assert f'--{name}: {100 * place:.2f}%;' in style


def test_the_data_name_the_classes(about):
    assert about.images.class_names == ['a', 'b']


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
