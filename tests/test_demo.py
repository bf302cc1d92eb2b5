"""The demo: its patches against the photographs' pixels, its run folder against timm's readers, interrupted runs."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_dataset
from timm.models import load_checkpoint, load_state_dict

pytest.importorskip('skimage')

from gmnet_timm import demo
from gmnet_timm.cli.main import main
from gmnet_timm.errors import MissingExtraError, UserError

TINY = dict(patches=8, batch_size=16, epochs=2, device='cpu')
TINY_FLAGS = ['--patches', '8', '--batch-size', '16', '--epochs', '2', '--device', 'cpu']


@pytest.fixture(scope='module')
def patches(tmp_path_factory):
    return demo.prepare_photo_patches(tmp_path_factory.mktemp('patches') / 'data', patches=8, seed=1)


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """An uninterrupted tiny run that the others are compared with. Not to be written to."""
    return demo.run_demo(tmp_path_factory.mktemp('reference'), **TINY)


def _positions(patches, split, name):
    for path in sorted((patches.root / split / name).iterdir()):
        row, col = map(int, re.fullmatch(r'r(\d+)-c(\d+)\.png', path.name).groups())
        yield path, row, col


def _weights(run):
    return load_state_dict(str(run / 'last.pth.tar'))


def _assert_same_run(run, other):
    assert (run / 'summary.csv').read_text() == (other / 'summary.csv').read_text()
    weights, expected = _weights(run), _weights(other)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[k], expected[k]) for k in expected)


def test_patches_are_the_photographs_pixels(patches):
    """skimage.io, not the code under test, reads the photographs."""
    from skimage import data, io
    for name, file in demo.PHOTOS.items():
        photo = io.imread(Path(data.__file__).parent / file)
        for split in demo.SPLITS:
            for path, row, col in _positions(patches, split, name):
                expected = photo[row:row + 64, col:col + 64]
                if expected.ndim == 3:
                    expected = expected @ [.299, .587, .114]  # ITU-R 601 luma
                with Image.open(path) as image:
                    assert image.mode == 'L' and image.size == (64, 64)
                    assert np.abs(np.asarray(image) - expected).max() <= 1


def test_splits_share_no_row_and_keep_a_patch_height_apart(patches):
    for name in demo.PHOTOS:
        rows = {split: [row for _, row, _ in _positions(patches, split, name)] for split in demo.SPLITS}
        assert min(rows['validation']) - (max(rows['train']) + 64) >= 64
        written = json.loads((patches.root / 'patches.json').read_text())['bands']
        bands = {split: written[split][name] for split in demo.SPLITS}
        assert bands['validation'][0] - bands['train'][1] == 64
        assert all(bands[s][0] <= row <= bands[s][1] - 64 for s in demo.SPLITS for row in rows[s])


def test_no_photograph_is_mostly_constant():
    rng = np.random.default_rng(0)
    for name in demo.PHOTOS:
        photo = demo.photo_pixels(name)
        corners = rng.integers(0, np.array(photo.shape) - 63, (200, 2))
        assert np.mean([photo[r:r + 64, c:c + 64].std() < 8 for r, c in corners]) < 1 / 3


def test_statistics_and_counts_are_of_the_files(patches):
    train = np.stack([np.asarray(Image.open(p)) for p in sorted(patches.root.glob('train/*/*.png'))]) / 255
    assert len(train) == 8 * 8
    assert len(list(patches.root.glob('validation/*/*.png'))) == 2 * 8
    assert patches.mean == pytest.approx(train.mean(), rel=1e-12)
    assert patches.std == pytest.approx(train.std(), rel=1e-12)


@pytest.mark.parametrize('split, count', [('train', 64), ('validation', 16), ('val', 16)])
def test_timm_reads_the_patches(patches, split, count):
    dataset = create_dataset('', str(patches.root), split=split, input_img_mode='L')
    assert len(dataset) == count
    assert list(dataset.reader.class_to_idx) == sorted(demo.PHOTOS)


def test_patches_are_reused_and_never_replaced(tmp_path):
    root = tmp_path / 'data'

    def state():
        return {p: p.stat().st_mtime_ns for p in root.rglob('*.png')}

    first = demo.prepare_photo_patches(root, patches=2)
    before = state()
    assert demo.prepare_photo_patches(root, patches=2) == first
    assert state() == before
    (root / 'mine.txt').write_text('x')
    with pytest.raises(UserError, match='does not hold these photo patches, so it is left as it is'):
        demo.prepare_photo_patches(root, patches=2, seed=7)
    assert state() == before and (root / 'mine.txt').exists()
    other = demo.prepare_photo_patches(tmp_path / 'other', patches=2, seed=7)
    assert other.mean != first.mean
    assert sorted(p.name for p in tmp_path.iterdir()) == ['data', 'other']


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'mine.txt').write_text('x')
    with pytest.raises(UserError, match='left as it is'):
        demo.prepare_photo_patches(tmp_path, patches=1)
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']


def test_run_folder_is_like_train_py(report):
    assert {p.name for p in report.run.iterdir()} == {
        'args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', *(f'checkpoint-{i}.pth.tar' for i in (0, 1))}
    rows = list(csv.DictReader((report.run / 'summary.csv').open()))
    assert list(rows[0]) == ['epoch', 'train_loss', 'train_top1', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert report.top1 == max(float(row['eval_top1']) for row in rows)
    assert yaml.safe_load((report.run / 'args.yaml').read_text())['data_dir'] == str(report.data)


def test_exported_model_is_the_best_checkpoint(report):
    model = timm.create_model(f'local-dir:{report.model}', pretrained=True).eval()
    other = timm.create_model('gmnet_s1', num_classes=8).eval()
    load_checkpoint(other, str(report.run / 'model_best.pth.tar'))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), other(x))
    config = json.loads((report.model / 'config.json').read_text())
    assert config['label_names'] == sorted(demo.PHOTOS)
    assert config['pretrained_cfg']['input_size'] == [3, 64, 64]


def test_top1_is_what_the_exported_model_reaches(report):
    """Counted file by file, without the loader of the training."""
    model = timm.create_model(f'local-dir:{report.model}', pretrained=True).eval()
    cfg = model.pretrained_cfg
    right = []
    for path in report.data.glob('validation/*/*.png'):
        x = torch.from_numpy((np.asarray(Image.open(path)) / 255 - cfg['mean'][0]) / cfg['std'][0]).float()
        with torch.inference_mode():
            right.append(cfg['label_names'][model(x.expand(1, 3, 64, 64)).argmax()] == path.parent.name)
    assert 100 * np.mean(right) == pytest.approx(report.top1)


def test_prediction_grid_shows_validation_patches(report):
    sheet = np.asarray(Image.open(report.prediction_grid))
    assert sheet.dtype == np.uint8 and sheet.ndim == 2
    tiles = [np.asarray(Image.open(p)).repeat(2, 0).repeat(2, 1) for p in report.data.glob('validation/*/*.png')]
    cells = [sheet[y:y + 128, x:x + 128] for y in range(sheet.shape[0] - 127) for x in range(24, sheet.shape[1], 152)]
    found = sum(any(c.shape == t.shape and np.array_equal(c, t) for c in cells) for t in tiles)
    assert found == len(tiles) == 16


@pytest.mark.slow
def test_same_seed_same_numbers(report, tmp_path):
    again = demo.run_demo(tmp_path, **TINY)
    _assert_same_run(again.run, report.run)
    assert again.prediction_grid.read_bytes() == report.prediction_grid.read_bytes()


def test_finished_run_is_not_overwritten(report):
    before = {p: p.stat().st_mtime_ns for p in report.run.iterdir()}
    with pytest.raises(UserError, match='holds a run already: choose another folder'):
        demo.run_demo(report.run.parent, **TINY)
    assert {p: p.stat().st_mtime_ns for p in report.run.iterdir()} == before


def test_missing_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'skimage', None)
    with pytest.raises(MissingExtraError, match=r'gmnet-timm\[demo\]'):
        demo.run_demo(tmp_path / 'new', **TINY)
    assert not (tmp_path / 'new' / 'run').exists()


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert main(['demo', '--output', str(tmp_path / 'file' / 'demo'), *TINY_FLAGS]) == 1
    assert re.search(rf'(?m)^error: Cannot write {tmp_path}/file/demo.*: .*', capsys.readouterr().err)


@pytest.mark.parametrize('flags, message', [
    (['--model', 'nonesuch'], 'nonesuch'),
    (['--epochs', '0'], 'epochs must be positive'),
    (['--batch-size', '100', '--patches', '2'], 'batch of 100'),
    (['--device', 'nonesuch'], 'Cannot use device nonesuch'),
])
def test_wrong_settings_write_nothing(flags, message, tmp_path, capsys):
    assert main(['demo', '--output', str(tmp_path / 'new'), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


@pytest.mark.skipif(sys.platform != 'linux' or os.geteuid() != 0, reason='mounts a small file system')
@pytest.mark.parametrize('size', ['100k', '20m'])
@pytest.mark.slow
def test_full_disk(size, report, tmp_path, capsys):
    """100k is full while the patches are written, 20m at the first checkpoint."""
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(tmp_path)]).returncode:
        pytest.skip('not allowed to mount')
    try:
        assert main(['demo', '--output', str(tmp_path / 'out'), *TINY_FLAGS]) == 1
        error = capsys.readouterr().err
        assert 'error: Cannot write' in error and 'the disk is full' in error and 'Traceback' not in error
    finally:
        subprocess.run(['umount', '--lazy', str(tmp_path)], check=True)  # files may still be open in a traceback


def test_a_training_that_diverges_is_said(tmp_path, capsys):
    assert main(['demo', '--output', str(tmp_path / 'new'), *TINY_FLAGS, '--lr', '1e30']) == 1
    assert re.search('error: The training diverged in epoch 0.*--lr', capsys.readouterr().err)


@pytest.mark.slow
def test_ctrl_c_is_obeyed_at_once(tmp_path):
    """Also while torch is still being imported."""
    for delay in (.2, 1., 3.):
        process = subprocess.Popen(
            [sys.executable, '-c', 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); '
             'from gmnet_timm.cli.main import main; sys.exit(main())', 'demo', '--output', str(tmp_path / str(delay)),
             '--device', 'cpu'], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode != 0 and 'RecursionError' not in errors
