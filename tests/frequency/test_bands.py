import copy
import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import CheckpointSaver, accuracy

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.frequency.bands import (
    Band,
    BandAccuracy,
    BandSplit,
    SplitOptions,
    band_images,
    evaluate_bands,
    list_bands,
)
from gmnet_timm.frequency.data import create_band_loader
from gmnet_timm.frequency.reports import write_csv

CLASSES = 6
MEAN, STD = (.4, .5, .6), (.2, .3, .25)
CONFIG = dict(input_size=(3, 32, 32), mean=MEAN, std=STD, interpolation='bilinear', crop_pct=.9, crop_mode='center')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An image folder: one class an orientation and coarseness of stripes, of different sizes."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        path = root / 'validation' / f'class{label}'
        path.mkdir(parents=True)
        for i in range(5):
            height, width = rng.integers(36, 50, 2)
            rows, cols = np.mgrid[:height, :width]
            wave = np.sin((1 + label) * (rows if label % 2 else cols) / 4)[..., None] * rng.uniform(.3, 1, 3)
            pixels = 128 + 60 * wave + rng.normal(0, 25, (height, width, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def model(folder):
    """Trained a little, so that its answers depend on what it sees."""
    torch.manual_seed(0)
    net = timm.create_model('test_resnet', num_classes=CLASSES)
    (images, targets), = create_band_loader(str(folder), CONFIG, workers=0)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), targets).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture
def shards(folder, tmp_path):
    """The images of `folder` as a webdataset, in the same order."""
    files = sorted((folder / 'validation').glob('*/*.png'))
    with tarfile.open(tmp_path / 'validation-0000.tar', 'w') as tar:
        for i, file in enumerate(files):
            for suffix, content in (('png', file.read_bytes()), ('cls', file.parent.name[-1].encode())):
                entry = tarfile.TarInfo(f'{i:04d}.{suffix}')
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return tmp_path


@pytest.mark.ecosystem  # webdataset
def test_a_stream_gives_what_the_folder_gives(folder, shards):
    stream = dict(dataset='wds/stripes', split='validation-0000.tar')
    images, targets = (torch.cat(parts) for parts in zip(*create_band_loader(str(shards), CONFIG, **stream)))
    expected, labels = next(iter(create_band_loader(str(folder), CONFIG, workers=0)))
    assert torch.equal(images, expected) and torch.equal(targets, labels)
    limited = next(iter(create_band_loader(str(shards), CONFIG, **stream, num_images=3)))
    assert torch.equal(limited[0], expected[:3])
    with pytest.raises(UserError, match='one process'):
        create_band_loader(str(shards), CONFIG, **stream, world_size=2)


def _numpy_band(images, band, radius):
    size = images.shape[-1]
    spectrum = np.fft.fftshift(np.fft.fft2(images.numpy().astype(np.float64)), axes=(-2, -1))
    rows, cols = np.mgrid[:size, :size] - size // 2
    mask = np.hypot(rows, cols) <= radius
    spectrum = spectrum * (mask if band == 'low' else ~mask)
    return torch.from_numpy(np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1))).real).float()


def test_counts_equal_timms_own_evaluation(folder, model):
    """timm's loader and accuracy on images that numpy has split."""
    radii = [2., 5.]
    got = evaluate_bands(model, create_band_loader(str(folder), CONFIG, num_classes=CLASSES, workers=0), radii)
    dataset = create_dataset('', str(folder), split='validation')
    loader = create_loader(
        dataset, CONFIG['input_size'], 8, mean=MEAN, std=STD, interpolation='bilinear', crop_pct=.9, num_workers=0,
        persistent_workers=False, device=torch.device('cpu'))
    images, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert [(r.band.kind, r.band.radius) for r in got] == [
        ('raw', None), ('low', 2.), ('high', 2.), ('low', 5.), ('high', 5.)]
    for result in got:
        part = images if result.band.kind == 'raw' else _numpy_band(images, result.band.kind, result.band.radius)
        with torch.no_grad():
            top1, top5 = accuracy(model(part), targets, topk=(1, 5))
        assert result.count == 30
        assert result.top1 == pytest.approx(top1.item(), abs=1e-4)
        assert result.top5 == pytest.approx(top5.item(), abs=1e-4)
    assert len({r.correct1 for r in got}) > 2  # it has told the bands apart


def test_pixels_and_normalized_differ_by_a_constant_in_the_high_part():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    normalized = list(band_images(images, list_bands([3.])))
    pixels = list(band_images(images, list_bands([3.]), SplitOptions(space='pixels'), MEAN, STD))
    black = -images.new_tensor(MEAN).view(-1, 1, 1) / images.new_tensor(STD).view(-1, 1, 1)
    torch.testing.assert_close(pixels[1], normalized[1])
    torch.testing.assert_close(pixels[2], normalized[2] + black)


def test_half_precision_autocast_counts_every_image(folder, model):
    loader = create_band_loader(str(folder), CONFIG, workers=0, batch_size=7)
    assert all(r.count == 30 for r in evaluate_bands(model, loader, [3.], amp_dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_counts_as_cpu(folder, model):
    loader = create_band_loader(str(folder), CONFIG, workers=0)
    expected = evaluate_bands(model, loader, [3.])
    assert evaluate_bands(copy.deepcopy(model).cuda(), loader, [3.]) == expected


def test_broken_images_are_counted_and_left_out(folder, model, tmp_path):
    root = tmp_path / 'validation'
    for path in (folder / 'validation').iterdir():
        (root / path.name).mkdir(parents=True)
        for file in path.iterdir():
            data = file.read_bytes()
            broken = (path.name, file.name) in {('class1', '2.png'), ('class4', '4.png'), ('class5', '0.png')}
            (root / path.name / file.name).write_bytes(data[:len(data) // 2] if broken else data)
    (root / 'class0' / '1.png').write_bytes(b'no image')
    loader = create_band_loader(str(tmp_path), CONFIG, workers=0, batch_size=2)
    assert evaluate_bands(model, loader, [3.])[0].count == 26
    assert loader.skipped == 4


@pytest.mark.parametrize('radii', [[-1.], [math.nan]])
def test_bad_radii(folder, model, radii):
    with pytest.raises(UserError, match='Radii'):
        evaluate_bands(model, create_band_loader(str(folder), CONFIG, workers=0), radii)


def test_classes_that_do_not_match(folder, model):
    with pytest.raises(UserError, match='6 classes .*, the model has 7'):
        create_band_loader(str(folder), CONFIG, num_classes=7)
    batch = [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 6]))]
    with pytest.raises(UserError, match='labels from 0 to 6, the model has 6 outputs'):
        evaluate_bands(model, batch, [3.])


def test_no_data(model, tmp_path):
    with pytest.raises(UserError, match='cannot be read'):
        create_band_loader(str(tmp_path), CONFIG)
    with pytest.raises(UserError, match='no image'):
        evaluate_bands(model, [], [3.])


def test_pixels_need_mean_and_std(model):
    batch = [(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(UserError, match='mean and std'):
        evaluate_bands(model, batch, [3.], options=SplitOptions(space='pixels'))
    with pytest.raises(UserError, match='one of'):
        SplitOptions(space='fourier')


def test_row_has_counts_and_intervals():
    row = BandAccuracy(Band('high', 12.), 30, 50, 100).as_row()
    assert (row['band'], row['radius'], row['top1'], row['top5'], row['count']) == ('high', '12', 30., 50., 100)
    assert row['top1_low'] < 30 < row['top1_high']


# --- the command line ---

def _write_run(path, folder, epochs=2, model='test_resnet', **kwargs):
    """A run folder as timm's train.py leaves it."""
    path.mkdir(parents=True)
    args = dict(
        model=model, model_kwargs=kwargs, num_classes=CLASSES, in_chans=None, gp=None, data_dir=str(folder),
        val_split='validation', dataset='', input_size=[3, 32, 32], mean=MEAN, std=STD, crop_pct=.9,
        interpolation='bilinear')
    (path / 'args.yaml').write_text(yaml.safe_dump({**args, 'mean': list(MEAN), 'std': list(STD)}))
    net = timm.create_model(model, num_classes=CLASSES, **kwargs)
    optimizer = torch.optim.SGD(net.parameters(), .1)
    saver = CheckpointSaver(net, optimizer, checkpoint_dir=str(path), recovery_dir=str(path))
    for epoch in range(epochs):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(.05 * torch.randn_like(parameter))
        saver.save_checkpoint(epoch, metric=float(epoch))
    return path


def _rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_cli_eval_writes_one_table_and_what_repeats_it(folder, tmp_path, capsys):
    run = _write_run(tmp_path / 'run', folder)
    gate = _write_run(tmp_path / 'gate', folder, 1, 'gmnet_s1', act_layer='gelu', gate='ln', base_dim=8,
                      depths=(1,) * 4)
    models = [str(run / 'checkpoint-1.pth.tar'), str(gate / 'last.pth.tar'), f'test_resnet={run}/checkpoint-0.pth.tar']
    argv = ['freq', 'eval', *models, '--data-dir', str(folder), '--radii', '3', '6.5', '--keep-dc', '--workers', '0',
            '--img-size', '32', '--mean', *map(str, MEAN), '--output', str(tmp_path / 'out')]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert 'raw' in printed and 'high 6.5' in printed and 'mean kept in high-pass images' in printed
    rows = _rows(tmp_path / 'out' / 'eval.csv')
    assert len(rows) == 3 * 5
    assert {row['keep_dc'] for row in rows} == {'True'} and {row['space'] for row in rows} == {'normalized'}
    reports = json.loads((tmp_path / 'out' / 'eval.json').read_text())
    assert [report['provenance']['model'] for report in reports] == ['test_resnet', 'gmnet_s1', 'test_resnet']
    assert reports[1]['provenance']['model_args']['gate'] == 'ln'
    assert all(report['data_config']['input_size'] == [3, 32, 32] for report in reports)
    assert all(report['data_config']['mean'] == list(MEAN) for report in reports)
    assert reports[0]['results'][0]['count'] == 30


def test_cli_eval_equals_the_library(folder, tmp_path):
    run = _write_run(tmp_path / 'run', folder)
    path = run / 'checkpoint-1.pth.tar'
    assert main(['freq', 'eval', str(path), '--data-dir', str(folder), '--radii', '4', '--workers', '0',
                 '--output', str(tmp_path)]) == 0
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    model.load_state_dict(torch.load(path, weights_only=False)['state_dict'])
    config = resolve_data_config(
        dict(input_size=(3, 32, 32), mean=MEAN, std=STD, crop_pct=.9, interpolation='bilinear'))
    expected = evaluate_bands(model.eval(), create_band_loader(str(folder), config, workers=0), [4.])
    assert [int(row['correct1']) for row in _rows(tmp_path / 'eval.csv')] == [r.correct1 for r in expected]
    assert [int(row['correct5']) for row in _rows(tmp_path / 'eval.csv')] == [r.correct5 for r in expected]


@pytest.mark.parametrize('argv, message', [
    (['--radii', '99'], 'corner of the spectrum'),
    (['--radii', '-2'], 'corner of the spectrum'),
    (['--mean', '.5', '.5'], 'one per channel'),
    (['--num-images', '0'], '--num-images'),
    (['--data-dir', 'nowhere'], 'cannot be read'),
    (['--data-dir', ''], 'There is no data'),
    (['--dataset', 'torch/nonsense'], 'cannot be read'),
    (['--device', 'nonsense'], 'Cannot use device'),
    (['--class-map', 'nowhere.txt'], 'cannot be read'),
])
def test_cli_eval_errors(folder, tmp_path, capsys, argv, message):
    run = _write_run(tmp_path / 'run', folder, 1)
    command = ['freq', 'eval', str(run / 'last.pth.tar'), '--data-dir', str(folder), '--workers', '0', '--radii', '3']
    assert main([*command, *argv, '--output', str(tmp_path / 'out')]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error


def test_cli_eval_of_what_is_no_model(folder, capsys):
    assert main(['freq', 'eval', 'nonsense', '--data-dir', str(folder)]) == 1
    assert main(['freq', 'eval', 'gmnet_s1', '--data-dir', str(folder)]) == 1  # no weights are known
    assert main(['freq', 'eval', 'resnet18=nowhere.pth', '--data-dir', str(folder)]) == 1
    assert main(['freq', 'eval', 'local-dir:nowhere', '--data-dir', str(folder)]) == 1
    assert capsys.readouterr().err.count('error: ') == 4


def test_cli_eval_of_weights_of_another_model(folder, tmp_path, capsys):
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'weights.pth')
    assert main(['freq', 'eval', f'resnet18={tmp_path}/weights.pth', '--data-dir', str(folder)]) == 1
    error = capsys.readouterr().err
    assert "does not fit timm.create_model('resnet18'" in error and len(error) < 500


@pytest.mark.slow
def test_cli_curves_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    from gmnet_timm.frequency import evaluation
    runs = [_write_run(tmp_path / 'a', folder, 2), _write_run(tmp_path / 'b', folder, 3)]
    loaded = []
    load = evaluation.load_model
    monkeypatch.setattr(evaluation, 'load_model', lambda spec, **kwargs: loaded.append(spec) or load(spec, **kwargs))
    out = tmp_path / 'out'
    argv = ['freq', 'curves', *map(str, runs), '--radii', '4', '--workers', '0', '--output', str(out)]
    assert main(argv) == 0
    first = _rows(out / 'curves.csv')
    assert len(loaded) == 5 and len(first) == 5 * 3 and (out / 'curves.png').stat().st_size > 10000
    assert main(argv) == 0
    assert len(loaded) == 5 and _rows(out / 'curves.csv') == first
    # as after a call that was cut off: the lines of one checkpoint are missing
    write_csv(first[:-3], out / 'curves.csv')
    assert main([*argv, '--no-figure']) == 0
    assert loaded[5:] == [str(runs[1] / 'checkpoint-2.pth.tar')] and _rows(out / 'curves.csv') == first
    # a checkpoint that was written anew, and other settings
    os.utime(runs[0] / 'checkpoint-0.pth.tar', ns=(1, 1))
    assert main(argv) == 0 and len(loaded) == 7 and len(_rows(out / 'curves.csv')) == len(first)
    assert main([*argv[:-2], '--keep-dc', '--output', str(out)]) == 0
    assert len(loaded) == 12 and len(_rows(out / 'curves.csv')) == 2 * len(first)


def test_cli_curves_of_what_is_no_run(tmp_path, capsys):
    assert main(['freq', 'curves', str(tmp_path)]) == 1
    assert 'args.yaml' in capsys.readouterr().err
    (tmp_path / 'args.yaml').write_text('model: test_resnet\n')
    assert main(['freq', 'curves', str(tmp_path)]) == 1
    assert 'checkpoint-EPOCH' in capsys.readouterr().err


def test_cli_image(folder, tmp_path, capsys):
    run = _write_run(tmp_path / 'run', folder, 1)
    names = tmp_path / 'names.txt'
    names.write_text('\n'.join(f'stripes {i}' for i in range(CLASSES)))
    argv = ['freq', 'image', str(folder / 'validation' / 'class1' / '0.png'), '--model', str(run / 'last.pth.tar'),
            '--radii', '3', '8', '--output', str(tmp_path)]
    assert main([*argv, '--class-names', str(names)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r'high r = 8 +stripes \d \d+\.\d %', printed)
    assert Image.open(tmp_path / '0.png').size[0] > 500
    argv[2] = str(names)
    assert main(argv) == 1
    assert 'cannot be read as an image' in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_count_every_image_once(folder, tmp_path):
    run = _write_run(tmp_path / 'run', folder, 1)
    (folder / 'validation' / 'class0' / 'broken.png').write_bytes(b'no image')
    argv = ['-m', 'gmnet_timm', 'freq', 'eval', str(run / 'last.pth.tar'), '--data-dir', str(folder), '--radii', '4',
            '--workers', '0', '--device', 'cpu']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}
    try:
        torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
        subprocess.run([sys.executable, *torchrun, *argv, '--output', str(tmp_path / 'two')], env=env, check=True)
        subprocess.run([sys.executable, *argv, '--output', str(tmp_path / 'one')], env=env, check=True)
    finally:
        (folder / 'validation' / 'class0' / 'broken.png').unlink()
    assert _rows(tmp_path / 'two' / 'eval.csv') == _rows(tmp_path / 'one' / 'eval.csv')
    assert _rows(tmp_path / 'two' / 'eval.csv')[0]['count'] == '30'
    assert _rows(tmp_path / 'two' / 'eval.csv')[0]['skipped'] == '1'


def test_a_dataset_of_torchvision(folder, model, tmp_path):
    """By timm's name for it; what it cannot decode is counted too."""
    root = tmp_path / 'validation'
    for i in range(CLASSES):
        (root / f'class{i}').mkdir(parents=True)
        (root / f'class{i}' / '0.png').write_bytes((folder / 'validation' / f'class{i}' / '0.png').read_bytes())
    (root / 'class2' / '1.png').write_bytes(b'no image')
    loader = create_band_loader(str(tmp_path), CONFIG, dataset='torch/folder', num_classes=CLASSES, workers=0)
    assert evaluate_bands(model, loader, [3.])[0].count == CLASSES
    assert loader.skipped == 1
    with pytest.raises(UserError, match='6 classes'):
        create_band_loader(str(tmp_path), CONFIG, dataset='torch/folder', num_classes=5)


# Borders and clipping


@pytest.mark.parametrize('size', [(16, 16), (9, 12)])
def test_mirrored_borders_are_a_cosine_transform(size):
    """The split by scipy's DCT, whose coefficient k has k / 2 cycles per image."""
    from scipy import fft
    images, radius = torch.rand(2, 3, *size, dtype=torch.float64), 2.5
    cosines = fft.dctn(images.numpy(), axes=(-2, -1))
    k, m = np.meshgrid(*map(np.arange, size), indexing='ij')
    low = fft.idctn(np.where(np.hypot(k, m) / 2 <= radius, cosines, 0), axes=(-2, -1))
    split = BandSplit(images, SplitOptions(border='mirror'))
    np.testing.assert_allclose(split(Band('low', radius)).numpy(), low, atol=1e-10)
    np.testing.assert_allclose(split(Band('high', radius)).numpy(), images.numpy() - low, atol=1e-10)


def test_a_step_at_the_border_is_no_frequency_of_a_mirrored_image():
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)

    def border_energy(border):
        high = BandSplit(ramp, SplitOptions(border=border))(Band('high', 8.))
        return high[..., :4].square().sum() + high[..., -4:].square().sum()

    assert border_energy('mirror') < .01 * border_energy('wrap')
    with pytest.raises(UserError, match='border'):
        SplitOptions(border='zero')


@pytest.mark.parametrize('space', ['normalized', 'pixels'])
def test_clipping(space):
    images = (torch.rand(2, 3, 16, 16).round() - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    plain, clipped = (BandSplit(images, SplitOptions(space=space, clip=clip), MEAN, STD) for clip in (False, True))

    def pixels(x):
        return x * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)

    for band in (Band('low', 4.), Band('high', 4.)):
        before, after = pixels(plain(band)), pixels(clipped(band))
        assert before.min() < -.01 and before.max() > .99
        torch.testing.assert_close(after, before.clamp(0, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match='or to clip'):
        BandSplit(images, SplitOptions(clip=True))
