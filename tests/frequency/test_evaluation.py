"""What an evaluation must refuse or say, so that no wrong number leaves it with exit status 0."""
import csv
import json
import math
import shutil
import struct
import zlib

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.frequency import evaluate_bands
from gmnet_timm.frequency.data import create_band_loader
from gmnet_timm.frequency.evaluation import EvalSettings, _with_data_of

CONFIG = dict(
    input_size=(3, 32, 32), mean=(0., 0., 0.), std=(1., 1., 1.), interpolation='bilinear', crop_pct=1.,
    crop_mode='center')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two classes, with other images for training than for validation."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('validation', 2)):
        for label in 'ab':
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save(timm.create_model('test_resnet', num_classes=2).state_dict(), path)
    return path


def _count(root, **kwargs):
    return sum(len(targets) for _, targets in create_band_loader(str(root), CONFIG, workers=0, **kwargs))


def _eval(weights, data, out, *argv):
    return main(['freq', 'eval', f'test_resnet={weights}', '--data-dir', str(data), '--radii', '3', '--workers', '0',
                 '--img-size', '32', '--output', str(out), *argv])


# --- the split -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dataset', ['', 'torch/folder'])
def test_a_missing_split_is_refused_and_the_others_are_named(data, dataset):
    with pytest.raises(UserError, match='no split test: the splits are train, validation'):
        create_band_loader(str(data), CONFIG, dataset=dataset, split='test')


def test_splits_that_exist(data):
    assert _count(data) == _count(data, split='val') == _count(data, split='validation') == 4
    assert _count(data, split='train') == _count(data, split='training') == 8
    assert _count(data / 'train') == _count(data / 'train', split='.') == 8  # a folder without splits
    with pytest.raises(UserError, match='no split validation: it has no splits; give --split .'):
        create_band_loader(str(data / 'train'), CONFIG, split='validation')


def test_training_images_are_not_taken_for_validation_images(data, tmp_path):
    shutil.copytree(data / 'train', tmp_path / 'train')
    with pytest.raises(UserError, match='no split validation: the splits are train'):
        create_band_loader(str(tmp_path), CONFIG)


# --- what a file holds -----------------------------------------------------------------------------------------------


def _one_image(path, data_config=CONFIG):
    loader = create_band_loader(str(path), data_config, split='.', workers=0)
    (images, _), = loader
    return images, loader


def test_16_bit_images_are_scaled_by_the_range_of_their_type(tmp_path):
    (tmp_path / 'a').mkdir()
    pixels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / 'a' / '0.png')
    images, loader = _one_image(tmp_path)
    expected = torch.from_numpy(pixels / 65535).expand(3, -1, -1).float()
    assert loader.skipped == 0 and (images[0] - expected).abs().max() < .6 / 255


def _write_png_of_16_bits(path, pixels):
    """RGB of 16 bits per channel, which PIL cannot write."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


def test_rgb_of_16_bits_keeps_its_high_bytes(tmp_path):
    """PIL reads these as 8 bits without a word: right to one of 255 levels, and on average."""
    (tmp_path / 'a').mkdir()
    pixels = np.random.default_rng(0).integers(0, 65536, (32, 32, 3), dtype=np.uint16)
    _write_png_of_16_bits(tmp_path / 'a' / '0.png', pixels)
    images, loader = _one_image(tmp_path)
    difference = images[0].double() - torch.from_numpy(pixels / 65535).permute(2, 0, 1)
    assert loader.skipped == 0 and difference.abs().max() < 1.01 / 255 and abs(difference.mean()) < .05 / 255


@pytest.mark.parametrize('workers', [0, 1])
def test_images_of_a_type_without_a_range_are_refused(tmp_path, workers):
    (tmp_path / 'a').mkdir()
    Image.fromarray(np.random.default_rng(0).random((32, 32), dtype=np.float32)).save(tmp_path / '0.tiff')
    (tmp_path / '0.tiff').rename(tmp_path / 'a' / '0.png')  # PIL looks at the content
    with pytest.raises(UserError, match='has 32-bit float pixels') as caught:
        list(create_band_loader(str(tmp_path), CONFIG, split='.', workers=workers))
    assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_files_that_timm_ignores_are_counted(data, weights, tmp_path, capsys):
    shutil.copytree(data / 'validation', tmp_path / 'validation')
    image = Image.new('RGB', (32, 32))
    image.save(tmp_path / 'validation' / 'a' / 'x.tiff')
    image.save(tmp_path / 'validation' / 'b' / 'y.BMP')
    (tmp_path / 'validation' / 'b' / 'notes.txt').touch()
    assert create_band_loader(str(tmp_path), CONFIG).ignored == 2
    assert _eval(weights, tmp_path, tmp_path / 'out') == 0
    assert '2 files of types that timm does not read' in capsys.readouterr().out


def test_data_that_is_not_there(weights, tmp_path, capsys):
    assert _eval(weights, tmp_path / 'nowhere', tmp_path / 'out') == 1
    error = capsys.readouterr().err
    assert 'nowhere, from --data-dir' in error and 'there is no such folder' in error


# --- what a model answers --------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """NaN for images whose first pixel is negative."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        first = x[:, 0, 0, 0, None]
        return torch.where(first < 0, math.nan, torch.cat([first, -first], 1)) * self.scale


def test_nan_logits_are_not_wrong_answers():
    images = torch.ones(3, 3, 8, 8)
    images[1] *= -1
    with pytest.raises(UserError, match='raw: the logits of 1 of 3 images are NaN'):
        evaluate_bands(Broken(), [(images, torch.zeros(3, dtype=torch.long))], [2.])


def test_a_model_that_is_not_a_classifier():
    with pytest.raises(UserError, match='not a classifier'):
        evaluate_bands(nn.Conv2d(3, 2, 1), [(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))], [2.])


# --- what is printed and written -------------------------------------------------------------------------------------


def test_bounds_of_nothing_right_are_wilsons():
    from scipy.stats import binomtest

    from gmnet_timm.frequency.reports import format_table
    low, high = binomtest(0, 64).proportion_ci(method='wilson')
    row = dict(band='raw', inner_radius='', radius='', top1=0., top1_low=100 * low, top1_high=100 * high, count=64)
    report = dict(
        name='m', results=[row], skipped=0, ignored=0, data_config=CONFIG,
        settings=dict(options=dict(space='normalized', keep_dc=False, restore_contrast=False, edge_width=0)))
    assert '0.0 (0.0-5.7)' in format_table([report])


def test_wilsons_interval_covers_the_truth_and_not_another_sample():
    """Exact sums over binomial probabilities: what the text about the interval claims, and what it must not claim."""
    from scipy.stats import binom

    from gmnet_timm.frequency.intervals import wilson_interval
    n, p = 400, .7
    k = np.arange(n + 1)
    low, high = np.array([wilson_interval(i, n) for i in k]).T
    probability = binom.pmf(k, n, p)
    truth = probability[(low <= p) & (p <= high)].sum()
    another = sum(
        q * (binom.cdf(np.floor(n * b), n, p) - binom.cdf(np.ceil(n * a) - 1, n, p))
        for q, a, b in zip(probability, low, high))
    assert truth == pytest.approx(.95, abs=.01) and another == pytest.approx(.83, abs=.015)


def test_every_model_is_described(data, weights, tmp_path, capsys):
    torch.save(timm.create_model('test_vit', num_classes=2).state_dict(), tmp_path / 'vit.pth')
    assert main(['freq', 'eval', f'test_resnet={weights}', f'test_vit={tmp_path}/vit.pth', '--data-dir', str(data),
                 '--radii', '3', '--workers', '0', '--output', str(tmp_path)]) == 0
    footer = capsys.readouterr().out.split('In brackets')[1]
    sizes = [timm.get_pretrained_cfg(name).input_size for name in ('test_resnet', 'test_vit')]
    crops = [timm.get_pretrained_cfg(name).crop_pct for name in ('test_resnet', 'test_vit')]
    assert sizes[0] != sizes[1] or crops[0] == crops[1] or footer.count('4 images of') == 2
    if sizes[0] != sizes[1]:
        assert all(f'4 images of {size[1]}x{size[2]}' in footer for size in sizes)


def test_results_of_an_earlier_call_are_not_replaced(data, weights, tmp_path, capsys):
    assert _eval(weights, data, tmp_path) == 0
    before = (tmp_path / 'eval.csv').read_bytes()
    assert _eval(weights, data, tmp_path, '--keep-dc') == 1
    assert '--force' in capsys.readouterr().err and (tmp_path / 'eval.csv').read_bytes() == before
    assert _eval(weights, data, tmp_path, '--keep-dc', '--force') == 0
    assert (tmp_path / 'eval.csv').read_bytes() != before


def test_rows_hold_what_decided_them(data, weights, tmp_path):
    from gmnet_timm.weights.files import weights_sha256
    assert _eval(weights, data, tmp_path, '--mean', '.5', '--std', '.25', '--edge-width', '2') == 0
    with (tmp_path / 'eval.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    digest = weights_sha256(torch.load(weights))
    assert {(row['mean'], row['std'], row['crop_mode'], row['weights_sha256'], row['edge_width']) for row in rows} == {
        ('0.5 0.5 0.5', '0.25 0.25 0.25', 'center', digest, '2.0')}
    report, = json.loads((tmp_path / 'eval.json').read_text())
    assert report['data_config']['crop_mode'] == 'center' and report['provenance']['weights_sha256'] == digest


def test_bands_between_radii(data, weights, tmp_path, capsys):
    argv = ['--radii', '3', '6', '9', '--bands', 'low', 'band-pass', 'band-stop']
    assert _eval(weights, data, tmp_path, *argv) == 0
    assert 'band-pass 3-6' in capsys.readouterr().out
    with (tmp_path / 'eval.csv').open(newline='') as file:
        rows = [(row['band'], row['inner_radius'], row['radius']) for row in csv.DictReader(file)]
    assert rows == [
        ('raw', '', ''), ('low', '', '3'), ('low', '', '6'), ('low', '', '9'), ('band-pass', '3', '6'),
        ('band-pass', '6', '9'), ('band-stop', '3', '6'), ('band-stop', '6', '9')]
    assert _eval(weights, data, tmp_path / 'one', '--bands', 'band-pass') == 1
    assert 'at least two' in capsys.readouterr().err


# --- values from a file that somebody else may have written ----------------------------------------------------------


@pytest.mark.parametrize('args', [
    dict(dataset='wds/x', data_dir='pipe:touch HERE'),
    dict(dataset='WDS/x', data_dir='/data'),
    dict(dataset='hfds/somebody/dataset'),
    dict(dataset='torch/cifar10', data_dir='/data'),
    dict(data_dir='pipe:touch HERE'),
    dict(data='https://somewhere/x.tar'),
    dict(data_dir='/data', val_split='pipe:touch HERE'),
    dict(data_dir='/data', class_map='map.pkl'),
    dict(data_dir='/data', class_map=['map.txt']),
    dict(data_dir='/data | touch HERE'),
])
def test_a_run_names_no_program(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model='test_resnet', **args)))
    torch.save(dict(state_dict=timm.create_model('test_resnet').state_dict(), epoch=0), run / 'checkpoint-0.pth.tar')
    assert main(['freq', 'curves', str(run), '--no-figure', '--workers', '0']) == 1
    assert 'if you trust it' in capsys.readouterr().err
    assert not (tmp_path / 'HERE').exists()


@pytest.mark.parametrize('args', [
    dict(data_dir='/data/images', val_split='validation'), dict(data='C:\\images', dataset='folder'),
    dict(data_dir='a folder', class_map='order of classes.txt')])
def test_usual_values_of_a_run_are_taken(args, tmp_path):
    found = _with_data_of(EvalSettings(None), args, tmp_path)
    assert found.data_dir == args.get('data_dir', args.get('data')) and found.class_map == args.get('class_map', '')
    stated = _with_data_of(EvalSettings('/mine'), dict(dataset='wds/x', data_dir='pipe:touch HERE'), tmp_path)
    assert stated.data_dir == '/mine' and stated.dataset == ''


def test_recorded_sha256_is_compared(data, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import save_file
    model = timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 1, 1), num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    assert main(['convert', str(tmp_path / 'model.pth'), str(tmp_path / 'good.safetensors')]) == 0
    with safe_open(tmp_path / 'good.safetensors', 'pt') as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors['head.weight'][0, 0] += 1
    (tmp_path / 'model').mkdir()
    save_file(tensors, tmp_path / 'model' / 'model.safetensors', metadata)
    config = dict(
        architecture='gmnet_s1', num_classes=2, model_args=dict(base_dim=8, depths=[1, 1, 1, 1]),
        pretrained_cfg=dict(input_size=[3, 32, 32]))
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
    capsys.readouterr()
    assert main(['freq', 'eval', f'local-dir:{tmp_path}/model', '--data-dir', str(data), '--radii', '3', '--workers',
                 '0', '--output', str(tmp_path / 'out')]) == 1
    assert 'SHA-256' in capsys.readouterr().err
