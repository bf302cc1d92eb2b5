"""The study: its controls, its parts of the data, what it trains, and its verdict."""
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from experiments.command import run_command
from experiments.study import report as study_report
from experiments.study import trainings as study
from experiments.study.__main__ import parser
from experiments.study.contrast import contrast_lines, contrasts
from experiments.study.data import PhotoData
from experiments.study.models import BODIES, COMPARISONS, VARIANTS, create_study_model
from gmnet_timm.errors import UserError

RESULTS = Path(__file__).parents[2] / 'experiments' / 'study' / 'results'

BANDS = ('low', 'high', 'high-shifted', 'high-faint')


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
    models = [create_study_model(body, variant, 56, 1, 8) for variant in VARIANTS]
    assert len({tuple((name, tuple(p.shape)) for name, p in model.named_parameters()) for model in models}) == 1
    plain, gated = (str([type(m).__name__ for m in model.modules()]) for model in models[:3:2])
    assert gated.count("'Gate'") >= 4 and gated.replace('Gate', 'ReLU').count('ReLU') >= plain.count('ReLU')


def test_gates_on_small_maps_are_refused():
    for body in BODIES:
        with pytest.raises(UserError, match='maps must be at least 7x7'):
            create_study_model(body, 'x·x', 48, 1, 8)


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


def _check_files(folder):
    accuracy = _rows(folder / 'accuracy.csv')
    assert len(accuracy) == 2 * 2 * (1 + 2 * len(BANDS))  # variants, seeds, bands of two radii
    assert {row['count'] for row in accuracy} == {'256'}
    record = json.loads((folder / 'study.json').read_text())
    assert record['versions'].keys() == {'gmnet_timm', 'timm', 'torch'} and record['seeds'] == [0, 1]
    assert len(_rows(folder / 'tests.csv')) == len(study_report.OUTCOMES)  # of one comparison


@pytest.mark.parametrize('argv, message', [
    (['--epochs', '1'], 'at least 2 epochs'), (['--seeds', '1'], '2 seeds'), (['--radii', '60'], 'corner'),
    (['--device', 'nonsense'], 'device'), (['--seeds', '0', '1000'], 'are for tuning'),
    (['--img-size', '200'], 'smaller or fewer'),
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
        for band, radius in [('raw', ''), *((band, r) for band in BANDS for r in ('3', '10'))]]


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


@pytest.mark.slow
def test_committed_comparisons_follow_from_the_committed_accuracies():
    fresh = study_report.test_rows(_rows(RESULTS / 'accuracy.csv'))
    assert [{key: str(value) for key, value in row.items()} for row in fresh] == _rows(RESULTS / 'tests.csv')


def test_controls_of_the_committed_study():
    for row in _rows(RESULTS / 'controls.csv'):
        if row['band'] in ('raw', 'low', 'high'):
            assert int(row['correct']) / int(row['count']) == 1 / 8
    record = json.loads((RESULTS / 'study.json').read_text())
    assert {row['seed'] for row in _rows(RESULTS / 'accuracy.csv')} == set(map(str, record['seeds']))


# --- the second plan -------------------------------------------------------------------------------------------------


def _contrast_rows(shift):
    return [dict(body=body, variant=variant, seed=str(seed), band=band, radius=radius, count='1000',
                 correct=str(300 + 9 * seed + (shift + 3 * seed) * ('·' in variant) + 500 * (radius in ('9', '14'))))
            for body in BODIES for variant in ('ReLU(x)', 'ReLU6(x)·x', 'GELU(x)·x') for seed in range(4)
            for band, radius in [('raw', ''), *((band, r) for band in BANDS for r in ('1', '6', '9', '14'))]]


@pytest.mark.parametrize('shift, verdict', [(60, 'confirmed'), (-60, 'contradicted'), (0, 'contradicted'),
                                            (28, 'confirmed'), (-5, 'contradicted')])
def test_pooled_contrast_and_its_verdict(shift, verdict):
    """Verdicts by the plan: sign of both intervals, else equivalence within three points. Radii 9 and 14 are left out.
    """
    found = contrasts(_contrast_rows(shift))
    expected = [(shift + 3 * seed) / 10 for seed in range(4)]
    assert found['ResNet', 'high'].mean == pytest.approx(np.mean(expected))
    assert found['ResNet', 'high'].p == pytest.approx(stats.ttest_1samp(expected, 0).pvalue)
    assert f'**{verdict}**' in contrast_lines(found)[-1]


def test_wide_intervals_are_open():
    rows = _contrast_rows(0)
    for row in rows:
        if '·' in row['variant']:
            row['correct'] = str(int(row['correct']) + (-1) ** int(row['seed']) * 100)
    assert '**open**' in contrast_lines(contrasts(rows))[-1]


def test_report_of_the_second_plan_follows_from_its_data():
    lines = contrast_lines(contrasts(_rows(RESULTS / 'plan-2' / 'accuracy.csv')))
    readme = (RESULTS.parents[1] / 'README.md').read_text()
    assert '\n'.join(lines[:-2]) in readme
