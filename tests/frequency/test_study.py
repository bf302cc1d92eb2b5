import csv
import json

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from gmnet_timm.cli.main import main
from gmnet_timm.frequency import study


def _rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('values', [[40., 60.], [40., 50., 45.], [40., 42., 47., 51., 39.]])
def test_interval_is_students(values):
    rows = [dict(family='f', label='l', model='m', epoch=1, band='raw', radius='', top1=v) for v in values]
    row, = study.summarize(rows)
    low, high = student.interval(.95, len(values) - 1, np.mean(values), np.std(values, ddof=1) / len(values) ** .5)
    assert row['seeds'] == len(values)
    assert row['top1'] == pytest.approx(np.mean(values), abs=.01)
    assert row['ci95_half_width'] == pytest.approx((high - low) / 2, abs=.01)
    assert (row['top1_low'], row['top1_high']) == pytest.approx((max(0, low), min(100, high)), abs=.01)


@pytest.mark.slow
def test_study_learns_and_goes_on_where_it_stopped(tmp_path, capsys):
    pytest.importorskip('skimage')
    argv = ['freq', 'study', '--output', str(tmp_path), '--epochs', '4', '--patches', '24', '--seeds', '0', '1',
            '--families', 'gmnet_s1', '--radii', '4', '--device', 'cpu']
    assert main(argv) == 0
    assert capsys.readouterr().out.count('-seed') == 8
    rows = _rows(tmp_path / 'bands.csv')
    assert len(rows) == 4 * 2 * (4 * 3 + 2)  # models, seeds, epochs, raw and two bands; two more in the last epoch
    assert {row['count'] for row in rows} == {'48'}
    summary = _rows(tmp_path / 'summary.csv')
    assert len(summary) == 4 * (4 * 3 + 2)
    best = max(float(row['top1']) for row in summary if row['band'] == 'raw' and row['epoch'] == '4')
    assert best > 25  # twice chance
    assert (tmp_path / 'gmnet_s1.png').stat().st_size > 10000
    # one run is lost, the others are not repeated, and the same run gives the same numbers
    lost = tmp_path / 'runs' / 'gmnet_s1-gelu-seed1.json'
    before = json.loads(lost.read_text())['bands']
    lost.unlink()
    assert main(argv) == 0
    assert capsys.readouterr().out.count('-seed') == 1
    after = json.loads(lost.read_text())['bands']
    assert [row['correct1'] for row in after] == [row['correct1'] for row in before]
    # other settings must not replace what took so long
    assert main([*argv[:-1], 'cpu', '--epochs', '5']) == 1
    assert 'other settings' in capsys.readouterr().err and json.loads(lost.read_text())['bands'] == after
    assert torch.get_num_threads() == json.loads(lost.read_text())['threads']


@pytest.mark.parametrize('argv, message', [
    (['--epochs', '1'], 'at least 2 epochs'), (['--radii', '60'], 'corner'), (['--device', 'nonsense'], 'device')])
def test_study_errors(tmp_path, capsys, argv, message):
    assert main(['freq', 'study', '--output', str(tmp_path / 'out'), *argv]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_one_seed_has_no_interval():
    rows = [dict(family='f', label='l', model='m', epoch=1, band='raw', radius='', top1=40.)]
    row, = study.summarize(rows)
    assert (row['ci95_half_width'], row['top1_low'], row['top1_high']) == ('', '', '')
    printed = study.format_summary([row])
    assert '40.0' in printed and '±' not in printed
