"""The study: its controls, its parts of the data, what it trains, and its verdict."""
import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from experiments.command import run_command
from experiments.study import models as study_models
from experiments.study import report as study_report
from experiments.study import trainings as study
from experiments.study.__main__ import parser
from experiments.study.data import FolderData, PhotoData
from experiments.study.models import BODIES, COMPARISONS, VARIANTS, create_study_model, measure_gates
from gmnet_timm.demo import PHOTOS, prepare_photo_patches
from gmnet_timm.errors import UserError

RESULTS = Path(__file__).parents[2] / 'experiments' / 'study' / 'results'


@pytest.fixture(scope='module')
def photos():
    pytest.importorskip('skimage')
    return PhotoData(train=24, test=16)


def _rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


# --- images ----------------------------------------------------------------------------------------------------------


def test_parts_share_no_pixel(photos):
    for name, photo in enumerate(photos.photos):
        covered = {}
        for part, corners in photos.corners.items():
            starts = np.zeros(np.add(photo.shape, 1), int)
            for rows, columns, sign in ((0, 0, 1), (56, 0, -1), (0, 56, -1), (56, 56, 1)):
                np.add.at(starts, tuple((corners[name] + (rows, columns)).T), sign)
            covered[part] = starts.cumsum(0).cumsum(1) > 0  # by how many patches each pixel is covered
            row, column = corners[name][0]
            assert covered[part][row:row + 56, column:column + 56].all()
        assert not (covered['train'] & covered['test']).any()
        assert not (covered['train'] & covered['tune']).any()
        assert not (covered['tune'] & covered['test']).any()


def test_patches_come_from_their_part_and_photograph(photos, monkeypatch):
    """Photographs whose pixels say which photograph and which quarter they are of."""
    coded = []
    for name, photo in enumerate(photos.photos):
        rows, columns = (np.arange(n) >= n // 2 for n in photo.shape)
        coded.append((10 * name + 2 * rows[:, None] + columns).astype(np.uint8))
    monkeypatch.setattr(photos, 'photos', coded)
    for part, quarters in (('train', {0, 3}), ('tune', {1}), ('test', {2})):
        images, labels = photos.draw(part, np.random.default_rng(0))
        codes = (images * photos.std + photos.mean).round().flatten(1)
        assert (codes.min(1).values == codes.max(1).values).all()
        codes = codes[:, 0].long()
        assert torch.equal(codes // 10, labels) and set((codes % 10).tolist()) == quarters
        assert labels.bincount().tolist() == [photos.counts[part]] * 8


def test_contrast_of_patches_is_that_of_numpy(photos):
    corners = photos.corners['test'][0]
    inside = {tuple(corner) for corner in corners.tolist()}
    photo = photos.photos[0]
    height, width = (n // 2 for n in photo.shape)
    rng = np.random.default_rng(0)
    for row, column in zip(rng.integers(height, 2 * height - 56, 50), rng.integers(0, width - 56, 50), strict=True):
        assert (photo[row:row + 56, column:column + 56].std() >= 8) == ((row, column) in inside)


def test_seeds_draw_anew_and_the_same_seed_draws_the_same(photos):
    def first(seed):
        return torch.cat([images for images, _ in photos.evaluation('test', seed)])

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))
    training = photos.training(3)
    epochs = [torch.cat([images for images, _ in training]) for _ in range(2)]
    assert len(training) == len(epochs[0]) / 32 and not torch.equal(*epochs)
    assert torch.equal(epochs[0], torch.cat([images for images, _ in photos.training(3)]))


def test_folder_keeps_what_it_tunes_with_out_of_the_training(tmp_path):
    pytest.importorskip('skimage')
    prepare_photo_patches(tmp_path / 'data', patches=16)
    data = FolderData(tmp_path / 'data', size=64, batch_size=16, workers=0, tune_every=8)
    train, tune = (set(data.parts[part].indices) for part in ('train', 'tune'))
    assert not train & tune and len(train) == 112 and len(tune) == 16
    assert data.classes == tuple(sorted(PHOTOS))
    images, labels = next(iter(data.training(0)))
    assert images.shape == (16, 3, 64, 64) and len(data.training(0)) == 7
    count = sum(len(labels) for _, labels in data.evaluation('test', 0))
    assert count == 8 * 4
    for root, message in ((tmp_path / 'none', 'cannot be read'), (tmp_path / 'data', 'too few')):
        with pytest.raises(UserError, match=message):
            FolderData(root, batch_size=64, tune_every=1000)


# --- controls --------------------------------------------------------------------------------------------------------


def test_mean_and_contrast_tell_nothing_once_images_are_standardized(photos):
    rows = study.control_accuracies(photos, [3., 10.], seed=0)
    top1 = {(row['band'], row['radius']): 100 * row['correct'] / row['count'] for row in rows}
    assert top1['normalized', ''] > 40  # the images themselves: three times chance, so that the control can fail
    for key in (('raw', ''), ('low', '3'), ('high', '3'), ('low', '10'), ('high', '10')):
        assert top1[key] == 12.5, key  # nothing differs: it always says the same class
    for radius in ('3', '10'):
        assert top1['high-shifted', radius] < 25  # the mean is of an image of any class
        assert top1['high-faint', radius] > 25  # contrast alone: why the high-pass images are standardised again


def test_conditions_do_not_depend_on_brightness_and_contrast():
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    contrast, brightness = torch.rand(2, 6, 3, 1, 1, dtype=torch.float64)
    changed = images * (contrast + .5) + brightness
    for a, b in zip(study.condition_images(images, [3., 8.]), study.condition_images(changed, [3., 8.]), strict=True):
        assert a[:2] == b[:2]
        assert torch.allclose(a[2], b[2]) == (a[0] != 'high-shifted')


def test_each_condition_has_the_frequencies_and_the_mean_that_it_says():
    images = torch.randn(4, 1, 32, 32, dtype=torch.float64) + 3 * torch.randn(4, 1, 1, 1, dtype=torch.float64)
    radius = torch.from_numpy(np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(32, 1 / 32)])))
    for band, _, x in study.condition_images(images, [5.]):
        power = torch.fft.fft2(x).abs().square()
        inside, beyond = power[..., radius <= 5].sum(-1), power[..., radius > 5].sum(-1)
        mean, std = x.mean((-2, -1)), x.std((-2, -1), correction=0)
        if band == 'low':
            assert (beyond < 1e-20 * inside).all()
        if band in ('high', 'high-faint'):
            assert (inside < 1e-20 * beyond).all()
        if band == 'high-shifted':
            assert torch.allclose(mean, images.mean((-2, -1)).roll(1, 0))
        else:
            assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-12)
        assert torch.allclose(std, torch.ones_like(std)) == (band != 'high-faint')


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('body', BODIES)
def test_variants_differ_in_nothing_but_the_function(body):
    torch.manual_seed(0)
    shapes = set()
    for variant in VARIANTS:
        model, replaced = create_study_model(body, variant, 56, 1, 8)
        shapes.add(tuple((name, tuple(p.shape)) for name, p in model.named_parameters()))
        found = measure_gates(model.eval(), replaced, torch.randn(2, 1, 56, 56), variant)
        assert len(found) == len(replaced) >= 4
        assert min(min(gate.height, gate.width) for gate in found) >= 7
    assert len(shapes) == 1


def test_gates_on_small_maps_are_refused():
    for body in BODIES:
        with pytest.raises(UserError, match='maps must be at least 7x7'):
            create_study_model(body, 'x·x', 48, 1, 8)


@pytest.mark.parametrize('body, name', [('ResNet', 'resnet18'), ('MobileNetV2', 'mobilenetv2_100')])
def test_images_of_the_papers_size_get_the_papers_networks(body, name):
    import timm
    model, replaced = create_study_model(body, 'ReLU6(x)·x', 224, 3, 1000)
    paper = timm.create_model(f'{name}_gate_relu6')
    assert [type(m) for m in model.modules()] == [type(m) for m in paper.modules()]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in paper.parameters())


def test_functions_are_what_their_labels_say():
    x = torch.linspace(-9, 9, 64, dtype=torch.float64).view(1, 4, 4, 4)
    a, b = x.chunk(2, 1)
    expected = {
        'ReLU(x)': x.clamp(min=0), 'GELU(x)': F.gelu(x), 'x·x': x * x, 'ReLU(x)·x': x.clamp(min=0) * x,
        'ReLU6(x)·x': x.clamp(0, 6) * x, 'GELU(x)·x': F.gelu(x) * x, 'ReLU6(4x)/4·x': x.clamp(0, 1.5) * x,
        'SiLU(a)·b': torch.cat([F.silu(a) * b, F.silu(b) * a], 1)}
    assert list(expected) == list(VARIANTS)
    for variant, y in expected.items():
        assert torch.allclose(VARIANTS[variant]()(x), y), variant
    assert {name for first, second, _ in COMPARISONS for name in (first, second)} <= VARIANTS.keys()


def test_clipped_share_is_the_tail_of_the_normal_distribution():
    model = torch.nn.Sequential(VARIANTS['ReLU6(4x)/4·x']())
    found, = measure_gates(model, list(model), torch.randn(64, 4, 64, 64), 'ReLU6(4x)/4·x')
    assert found.clipped == pytest.approx(stats.norm.sf(1.5), rel=.02) and found.std == pytest.approx(1, rel=.01)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_learning_rate_is_the_best_of_all_seeds_and_of_equal_ones_the_smallest():
    def choose(*correct):
        tuned = {study.Run('ResNet', 'x·x', lr, seed): {'accuracy': [dict(correct=c)]}
                 for seed in (1000, 1001) for lr, c in zip((.1, .001, .01), correct, strict=True)}
        tuned[study.Run('ResNet', 'ReLU(x)', .5, 1000)] = {'accuracy': [dict(correct=999)]}
        return study._choose(('ResNet', 'x·x'), [.1, .001, .01], tuned)

    assert choose(5, 4, 3) == .1 and choose(5, 4, 5) == .01 and choose(0, 0, 0) == .001


ARGS = ['--epochs', '2', '--seeds', '0', '1', '--tuning-seeds', '2', '--learning-rates', '0.003', '--radii', '3', '10',
        '--bodies', 'ResNet', '--variants', 'ReLU(x)', 'x·x', '--device', 'cpu', '--batch-size', '128']


@pytest.mark.slow
def test_study_runs_and_keeps_its_settings(tmp_path, capsys):
    pytest.importorskip('skimage')
    assert run_command(parser(), [*ARGS, '--output', str(tmp_path / 'whole')]) == 0
    _check_files(tmp_path / 'whole')
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / 'whole').glob('runs/*.json')}
    next(iter(finished)).unlink()  # a study that was stopped takes up what is missing, and nothing else
    assert run_command(parser(), [*ARGS, '--output', str(tmp_path / 'whole')]) == 0
    assert sum(path.stat().st_mtime_ns != before for path, before in finished.items()) == 1
    # other settings must not replace what took so long
    capsys.readouterr()
    assert run_command(parser(), [*ARGS, '--radii', '4', '--output', str(tmp_path / 'whole')]) == 1
    assert 'other settings' in capsys.readouterr().err


@pytest.mark.slow
def test_study_runs_on_a_folder_of_colour_images(tmp_path):
    pytest.importorskip('skimage')
    prepare_photo_patches(tmp_path / 'data', patches=32)
    argv = [*ARGS, '--batch-size', '32', '--data-dir', str(tmp_path / 'data'), '--img-size', '56', '--workers', '0']
    assert run_command(parser(), [*argv, '--output', str(tmp_path / 'out')]) == 0
    record = json.loads((tmp_path / 'out' / 'study.json').read_text())
    assert record['data']['images'] == str(tmp_path / 'data') and len(record['classes']) == 8
    assert {row['count'] for row in _rows(tmp_path / 'out' / 'accuracy.csv')} == {'64'}  # all of the validation split
    assert {row['count'] for row in _rows(tmp_path / 'out' / 'tuning.csv')} == {'5'}  # one in fifty of 256
    assert all(int(r['correct']) == 8 for r in _rows(tmp_path / 'out' / 'controls.csv') if r['band'] in ('raw', 'high'))


def _check_files(folder):
    accuracy = _rows(folder / 'accuracy.csv')
    assert len(accuracy) == 2 * 2 * (1 + 2 * len(study.BANDS))  # variants, seeds, bands of two radii
    assert {row['count'] for row in accuracy} == {'256'}
    for row in _rows(folder / 'confusion.csv'):  # the diagonal of all labels is what the accuracies count
        same = [r for r in _rows(folder / 'confusion.csv') if all(
            r[key] == row[key] for key in ('variant', 'band', 'radius'))]
        correct = sum(int(r[r['label']]) for r in same)
        assert correct == sum(int(r['correct']) for r in accuracy if all(
            r[key] == row[key] for key in ('variant', 'band', 'radius')))
        break
    record = json.loads((folder / 'study.json').read_text())
    assert record['versions'].keys() == {'gmnet_timm', 'timm', 'torch'} and record['seeds'] == [0, 1]
    for figure in ('resnet.png', 'comparisons.png', 'confusion.png'):
        assert (folder / figure).stat().st_size > 10000


@pytest.mark.parametrize('argv, message', [
    (['--epochs', '1'], 'at least 2 epochs'), (['--seeds', '1'], '2 seeds'), (['--radii', '60'], 'corner'),
    (['--device', 'nonsense'], 'device'), (['--seeds', '0', '1000'], 'are for tuning'),
    (['--img-size', '200'], 'smaller or fewer'), (['--data-dir', 'absent'], 'cannot be read'),
    (['--variants', 'Swish(x)'], 'There is no variant Swish(x). Variants: ReLU(x), GELU(x)')])
def test_study_errors(tmp_path, capsys, argv, message):
    pytest.importorskip('skimage')
    assert run_command(parser(), ['--output', str(tmp_path / 'out'), *argv]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


# --- numbers ---------------------------------------------------------------------------------------------------------


def _accuracies(**shift):
    """Rows of two radii and three seeds: variants differ by what `shift` says, plus noise of the seed."""
    noise = {0: 0, 1: 30, 2: -10}
    return [
        dict(body='ResNet', variant=variant, lr='0.001', seed=str(seed), band=band, radius=radius, chosen='1',
             count='1000',
             correct=str(500 + noise[seed] + 7 * seed * i + (shift.get(variant, 0) if band == 'high' else 0)))
        for i, variant in enumerate(VARIANTS) for seed in noise
        for band, radius in [('raw', ''), *((band, r) for band in study.BANDS for r in ('3', '10'))]]


def test_outcome_is_the_mean_over_radii_and_differences_are_paired():
    rows = _accuracies(**{'x·x': 100})
    found = study_report.outcomes(rows)
    assert found['high']['ResNet', 'x·x'][1] == pytest.approx(100 * (500 + 30 + 14 + 100) / 1000)
    assert found['high-low']['ResNet', 'x·x'][2] == pytest.approx(10)
    first = study_report.compare(found['high'])[0]
    differences = [10 + 100 * 14 * seed / 1000 for seed in range(3)]  # the noise of the seed is gone
    assert (first.mean, first.std) == pytest.approx((np.mean(differences), np.std(differences, ddof=1)))
    assert first.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert len(study_report.compare(found['high'])) == len(COMPARISONS)


def test_power_is_for_the_first_step_of_holm():
    row, = study_report.power_rows(_accuracies(), seeds=10)
    assert row['comparisons'] == len(COMPARISONS) and row['alpha'] == pytest.approx(.05 / len(COMPARISONS), abs=1e-5)
    limit = stats.t.ppf(1 - .025 / len(COMPARISONS), 9)
    shift = row['detectable'] / row['std'] * math.sqrt(10)
    power = stats.nct.sf(limit, 9, shift) + stats.nct.cdf(-limit, 9, shift)
    assert power == pytest.approx(.8, abs=.02)  # both were rounded


def test_committed_comparisons_follow_from_the_committed_accuracies():
    fresh = [dict(outcome=outcome, **study_report._test_row(c))
             for outcome, values in study_report.outcomes(_rows(RESULTS / 'accuracy.csv')).items()
             for c in study_report.compare(values)]
    assert [{key: str(value) for key, value in row.items()} for row in fresh] == _rows(RESULTS / 'tests.csv')


def test_page_claims_nothing_from_fewer_than_ten_seeds():
    found = study_report.outcomes(_accuracies(**{'x·x': 200}))['high']
    assert 'Nothing is claimed: 3 of the 10 seeds' in study_report._verdict(study_report.compare(found))
    ten = {pair: {seed: by_seed[seed % 3] + seed / 100 for seed in range(10)} for pair, by_seed in found.items()}
    verdict = study_report._verdict(study_report.compare(ten))
    assert re.search(r'\*\*Higher\*\* \(1 of 9\): ResNet: x·x − ReLU\(x\) \+2\d', verdict)


def test_controls_of_the_committed_study():
    for row in _rows(RESULTS / 'controls.csv'):
        if row['band'] in ('raw', 'low', 'high'):
            assert int(row['correct']) / int(row['count']) == 1 / 8
    assert min(int(gate['height']) for gate in _rows(RESULTS / 'gates.csv')) >= study_models.SMALLEST_MAP
    record = json.loads((RESULTS / 'study.json').read_text())
    assert {row['seed'] for row in _rows(RESULTS / 'accuracy.csv')} == set(map(str, record['seeds']))
