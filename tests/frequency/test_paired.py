"""Paired comparisons, against statsmodels and by how often intervals hold the truth."""
import csv
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.frequency import (
    Band,
    BandAccuracy,
    PairedDifference,
    evaluate_bands,
    load_results,
    paired_difference,
    save_results,
)
from gmnet_timm.frequency.evaluation import group_rows
from gmnet_timm.frequency.figures import draw_band_accuracy


@pytest.mark.parametrize('only_model, only_baseline', [(0, 0), (5, 0), (3, 11), (40, 22), (7, 7)])
def test_p_value_is_that_of_statsmodels(only_model, only_baseline):
    found = PairedDifference(only_model, only_baseline, 200)
    table = [[100, only_model], [only_baseline, 100 - only_model - only_baseline]]
    expected = mcnemar(table, exact=True).pvalue if only_model + only_baseline else 1
    assert found.p_value == pytest.approx(min(1, expected))
    assert found.difference == pytest.approx((only_model - only_baseline) / 2)


@pytest.mark.parametrize('count, model, baseline', [(50, .1, .05), (300, .08, .08), (1000, .02, .01)])
def test_intervals_hold_the_truth(count, model, baseline):
    rng = np.random.default_rng(0)
    draws = rng.multinomial(count, [model, baseline, 1 - model - baseline], size=3000)
    held = 0
    for only_model, only_baseline, _ in draws:
        low, high = PairedDifference(int(only_model), int(only_baseline), count).interval()
        held += low <= 100 * (model - baseline) <= high
    assert .935 < held / len(draws) < .985


def test_the_same_images_say_more_than_two_accuracies():
    """71 and 70 of 100 right: nothing by two intervals, but if 1 image differs, or 41, is another matter."""
    baseline = torch.arange(100) < 70
    one = torch.arange(100) < 71
    found = paired_difference(one, baseline)
    assert (found.only_model, found.only_baseline, found.p_value) == (1, 0, 1.)
    with pytest.raises(UserError, match='cannot be paired'):
        paired_difference(one[:50], baseline)


def test_answers_are_those_that_are_counted():
    model = timm.create_model('gmnet_s1', base_dim=4, depths=(1, 1, 1, 1), num_classes=2).eval()
    images, labels = torch.randn(9, 3, 32, 32), torch.arange(9) % 2
    found = evaluate_bands(model, [(images[:5], labels[:5]), (images[5:], labels[5:])], [3], show_progress=False)
    for band in found:
        assert band.answers.shape == (9,) and int(band.answers.sum()) == band.correct1
    with torch.no_grad():
        assert torch.equal(found[0].answers, model(images).argmax(1) == labels)


def test_command(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in 'ab':
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'data' / name / f'{i}.png')
    specs = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = timm.create_model('gmnet_s1', base_dim=4, depths=(1, 1, 1, 1), num_classes=2)
        torch.save(model.state_dict(), tmp_path / f'{seed}.pth')
        specs.append(str(tmp_path / f'{seed}.pth'))
    argv = ['freq', 'eval', *specs, '--data-dir', str(tmp_path / 'data'), '--img-size', '32', '--radii', '4',
            '--workers', '0', '--no-figure', '--output', str(tmp_path / 'out')]
    assert main([*argv, '--baseline', specs[1]]) == 0
    assert 'on the same images' in capsys.readouterr().out
    with (tmp_path / 'out' / 'eval-paired.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['band'] for row in rows] == ['raw', 'low 4', 'high 4']
    first, second = load_results(tmp_path / 'out' / 'eval-answers.npz').values()
    for row, one, other in zip(rows, first, second, strict=True):
        assert one.band == other.band and one.count == 12
        assert int(row['only_model']) == int((one.answers & ~other.answers).sum())
    assert main([*argv, '--baseline', 'other']) == 1


@pytest.mark.parametrize('words', [['b'], ['--groups', 'one']])
def test_missing_scipy_is_said_before_the_work(monkeypatch, capsys, words):
    monkeypatch.setitem(sys.modules, 'scipy.stats', None)
    assert main(['freq', 'eval', 'a', *words, '--data-dir', 'nowhere', '--no-figure']) == 3
    assert "scipy is not installed. Install it with: pip install 'gmnet-timm[freq]'" in capsys.readouterr().err


def test_results_are_saved_loaded_and_drawn(tmp_path):
    bands = [Band('raw'), Band('low', 4.), Band('band-pass', 9.5, 4.)]
    results = {'a/b': [BandAccuracy(band, 2, 3, 4, torch.tensor([True, False, True, False])) for band in bands],
               'c': [BandAccuracy(band, 1, 4, 4, torch.tensor([False, False, False, True])) for band in bands]}
    save_results(results, tmp_path / 'x.npz')
    loaded = load_results(tmp_path / 'x.npz')
    assert loaded == results
    assert all(torch.equal(a.answers, b.answers) for label in results for a, b in zip(results[label], loaded[label]))
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in draw_band_accuracy(loaded).axes[0].lines
             if len(line.get_xdata()) == 1]
    assert ([4.], [50.]) in drawn and ([4.], [25.]) in drawn


def test_groups_are_means_over_trainings_with_students_interval():
    rows = [[dict(band='raw', inner_radius='', radius='', top1=top1)] for top1 in (50., 54., 52., 70.)]
    first, second = group_rows(['gate', 'gate', 'gate', 'relu'], rows)
    low, high = stats.t.interval(.95, 2, loc=52, scale=2 / 3 ** .5)
    assert (first['label'], first['trainings'], first['top1']) == ('gate', 3, 52)
    assert (first['top1_low'], first['top1_high']) == pytest.approx((low, high))
    assert second['top1'] == 70 and np.isnan(second['top1_low'])
    with pytest.raises(UserError, match='gate have not the same bands'):
        group_rows(['gate', 'gate'], [rows[0], []])


def test_groups_of_the_command(tmp_path, capsys):
    for name in 'ab':
        (tmp_path / 'data' / name).mkdir(parents=True)
        Image.effect_noise((32, 32), 60).convert('RGB').save(tmp_path / 'data' / name / '0.png')
    model = timm.create_model('gmnet_s1', base_dim=4, depths=(1, 1, 1, 1), num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    argv = ['freq', 'eval', *[str(tmp_path / 'x.pth')] * 3, '--data-dir', str(tmp_path / 'data'), '--img-size', '32',
            '--radii', '4', '--workers', '0', '--output', str(tmp_path / 'out'), '--groups']
    assert main([*argv, 'one', 'one']) == 1
    assert '2 are given for 3' in capsys.readouterr().err
    assert main([*argv, 'one', 'one', 'two', '--figure-width', '0']) == 1
    assert '1 to 40 inches' in capsys.readouterr().err
    assert main([*argv, 'one', 'one', 'two', '--figure-width', '6.5']) == 0
    with Image.open(tmp_path / 'out' / 'eval.png') as figure:
        assert figure.width / figure.info['dpi'][0] == pytest.approx(6.5, abs=.02)
    with (tmp_path / 'out' / 'eval-groups.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['label'], row['trainings']) for row in rows] == [('one', '2')] * 3 + [('two', '1')] * 3
    assert rows[0]['top1'] == rows[0]['top1_low'] == rows[0]['top1_high'] and (tmp_path / 'out' / 'eval.png').exists()
