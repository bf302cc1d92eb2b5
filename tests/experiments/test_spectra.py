"""GmNets with activations in place of gates: the functions, the rows, and the report of the committed trainings."""
import csv
import math
import statistics
from pathlib import Path

import pytest
import timm
import torch
from scipy import stats

from experiments.command import run_command
from experiments.spectra.__main__ import parser
from experiments.spectra.trainings import VARIANTS, gaussian_high, report
from gmnet_timm.frequency import layer_spectra
from gmnet_timm.frequency.gaussian import power_law

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize('variant, expected', [('ReLU(x)', torch.relu), ('GELU(x)', torch.nn.functional.gelu)])
def test_a_gate_that_is_an_activation_is_one_with_its_gradient(variant, expected):
    block = timm.create_model('gmnet_s1', act_layer=VARIANTS[variant]).stages[0][1]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    got, want = block.act(x) * block.gate(x), expected(x)
    assert torch.allclose(got, want)
    upstream = torch.randn_like(x)
    assert torch.allclose(*(torch.autograd.grad(y, x, upstream)[0] for y in (got, want)))


@pytest.mark.parametrize('variant, expected', [
    ('ReLU(x)', torch.relu), ('GELU(x)', torch.nn.functional.gelu), ('ReLU6(x)·x', lambda x: x.clamp(0, 6) * x)])
def test_theory_is_of_the_function_and_not_of_two_operands(variant, expected):
    """Of a network that is one gate on Gaussian maps, what is measured is what is predicted."""
    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            act = VARIANTS[variant]
            self.act = act() if callable(act) else torch.nn.ReLU6()

        def forward(self, x):
            return self.act(x) * x

    noise = torch.fft.rfft2(torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    maps = torch.fft.irfft2(noise * power_law(32, 1.)[0].sqrt() * 32, s=(32, 32)).float() - .5
    assert torch.allclose(Gate()(maps), expected(maps), atol=1e-6)
    layer, = layer_spectra(torch.nn.Sequential(Gate()), [(maps, torch.zeros(200))], channels=None)
    assert gaussian_high(layer, variant) == pytest.approx(layer.after.high, rel=.05)


@pytest.mark.slow
def test_program_trains_measures_and_goes_on(tmp_path, capsys):
    pytest.importorskip('skimage')
    argv = ['--patches', '8', '--epochs', '1', '--seeds', '0', '1', '--variants', 'ReLU6(x)·x', 'ReLU(x)',
            '--output', str(tmp_path)]
    assert run_command(parser(), argv) == 0
    assert 'ReLU6(x)·x over ReLU(x)' in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / 'spectra.csv').open(newline='')))
    assert len(rows) == 2 * 2 * 14  # variants, seeds, blocks on maps of 4×4 and more
    assert all(float(row['log_ratio']) == pytest.approx(math.log(float(row['after']) / float(row['before'])))
               for row in rows)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob('?-seed*.csv')}
    assert run_command(parser(), argv) == 0 and before == {path: path.stat().st_mtime_ns for path in before}
    assert run_command(parser(), ['--variants', 'Swish(x)']) == 1


def test_report_of_the_committed_trainings():
    rows = list(csv.DictReader((ROOT / 'experiments' / 'spectra' / 'results' / 'spectra.csv').open(newline='')))
    text = report(rows)
    assert text in (ROOT / 'experiments' / 'README.md').read_text()
    means = {}
    for row in rows:
        means.setdefault((row['variant'], row['seed']), []).append(float(row['log_ratio']))
    means = {key: statistics.fmean(values) for key, values in means.items()}
    assert {key[1] for key in means} == set('0123') and len(means) == 12
    difference = [means['ReLU6(x)·x', seed] - means['ReLU(x)', seed] for seed in '0123']
    low, high = stats.t.interval(.95, 3, loc=statistics.fmean(difference), scale=stats.sem(difference))
    assert f'| {math.exp(low):.3f} to {math.exp(high):.3f} |' in text
