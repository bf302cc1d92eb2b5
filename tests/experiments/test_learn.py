"""Learning by frequency: closed forms, exact limits of what a network can do, and controls that must fail to learn."""
import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from experiments.command import run_command
from experiments.learn import tasks as learn_tasks
from experiments.learn import trainings as learn
from experiments.learn.__main__ import parser
from experiments.learn.contrasts import contrast_lines
from experiments.learn.network import Network, train_step
from experiments.learn.tasks import IDEAL, BandImages, Sinusoids, create_task
from experiments.variants import Variant
from gmnet_timm.errors import UserError

ROOT = Path(__file__).parents[2]
IMAGE_TASKS = learn_tasks.TASKS[1:]


def _network(variant, task, **kwargs):
    return Network(Variant(variant), **task.network, **kwargs)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', learn_tasks.TASKS)
def test_variants_have_equally_many_parameters(name):
    task = create_task(name, [0])
    counts = {variant: _network(variant, task).num_parameters for variant in (*learn.VARIANTS['regression'], 'silu*v')}
    assert max(counts.values()) / min(counts.values()) < 1.01
    p = _network('silu*v', task).initial([0, 1])
    assert sum(x.numel() for x in p.values()) == 2 * counts['silu*v']


@pytest.mark.parametrize('variant, highest', [('identity', 1), ('identity*x', 8), ('identity*v', 8), ('relu*x', None)])
def test_what_a_network_can_do_at_all(variant, highest):
    """On the circle, a linear network has frequency 1 alone, and each product doubles the highest: 8 after 3 blocks."""
    task = Sinusoids([0, 1])
    network = _network(variant, task)
    output = network(network.initial(task.seeds), task.data[0])
    power = torch.fft.rfft(output.double())[:, 0].abs().square()
    power = power / power[:, 1:].sum(1, keepdim=True)
    if highest is None:
        assert power[:, 9:].max() > 1e-6
    else:
        assert power[:, highest + 1:].max() < 1e-10 < 1e-7 < power[:, highest].min()


def test_depthwise_is_a_convolution_of_maps_that_wrap_around():
    network = Network(Variant('relu'), 4, 5, width=5, grid=8)
    x, weight = torch.randn(2, 5, 3 * 64), torch.randn(2, 5, 9)
    found = network._depthwise(x, weight)
    for i in range(2):
        maps = F.pad(x[i].view(5, 3, 8, 8).transpose(0, 1), (1, 1, 1, 1), mode='circular')
        expected = F.conv2d(maps, weight[i].view(5, 1, 3, 3), groups=5).transpose(0, 1)
        torch.testing.assert_close(found[i].view(5, 3, 8, 8), expected)


def test_adam_is_torchs_with_a_learning_rate_per_replica():
    generator = torch.Generator().manual_seed(0)
    target = 5 + torch.randn(2, 3, 4, generator=generator)
    p = {'a': torch.zeros(2, 3, 4, requires_grad=True)}
    expected = [torch.zeros(3, 4, requires_grad=True) for _ in range(2)]
    optimizers = [torch.optim.Adam([x], lr=lr) for x, lr in zip(expected, (.1, .01))]
    state = {}
    for step in range(1, 21):
        train_step((p['a'] - target).square().sum((1, 2)), p, state, torch.tensor([.1, .01]), step)
        for i, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            (expected[i] - target[i]).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(p['a'].detach(), torch.stack(expected).detach(), rtol=0, atol=1e-5)


def test_replicas_do_not_mix():
    task = BandImages('texture', 'white', [3, 4])
    network = _network('gelu*x', task)
    p, (x, y) = network.initial(task.seeds), task.batch()
    both = task.loss(network(p, x), y)
    alone = task.loss(network({name: value[1:] for name, value in p.items()}, x[1:]), y[1:])
    assert both[1].item() == pytest.approx(alone.item(), rel=1e-5) and both[0] != both[1]


def test_scale_is_that_of_what_enters_the_activation():
    task = Sinusoids([0, 1, 2])
    inside = []
    network = _network('relu6*x', task, scale=3.)
    network(network.initial(task.seeds), task.data[0], inside)
    assert len(inside) == 3 and torch.stack(inside).std().item() == pytest.approx(3, rel=.1)


@pytest.mark.parametrize('name, message', [
    ('nonsense', 'no activation'), ('', 'no activation'), ('relu*y', r'ACTIVATION\*x'), ('prelu', 'of its own')])
def test_names_that_are_no_variants(name, message):
    with pytest.raises(UserError, match=message):
        Variant(name)


def test_labels():
    names = ('identity', 'identity*x', 'relu6*x', 'gelu*v', 'mish')
    assert [Variant(name).label for name in names] == ['x', 'x·x', 'ReLU6(x)·x', 'GELU(x)·v', 'mish(x)']


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_error_by_frequency():
    task = Sinusoids([0])
    y = task.data[1]
    assert y.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert task.score(torch.zeros_like(y), y)[0].tolist() == pytest.approx([1.] * 10)
    without_4 = y.clone()
    spectrum = torch.fft.rfft(without_4)
    spectrum[..., 4] *= .5
    score = dict(zip(task.bands, task.score(torch.fft.irfft(spectrum, 128), y)[0].tolist()))
    assert score.pop('4') == pytest.approx(.25, abs=1e-5) and max(score.values()) < 1e-9
    assert task.score(y * math.nan, y)[0].tolist() == [1.] * 10  # diverged: nothing learned


@pytest.mark.parametrize('name', IMAGE_TASKS)
def test_the_best_observer_reads_every_band_equally_well(name):
    """Simulated on pixels, against the closed form at whose solution the images are made."""
    task = create_task(name, [0, 1])
    count = 6000
    images, bits = task.images(count, [torch.Generator().manual_seed(i) for i in range(2)])
    spectrum = torch.fft.rfft2(images, norm='ortho') / learn_tasks.amplitudes(task.background)
    half = learn_tasks.independent_modes()
    if task.kind == 'pattern':
        statistic = torch.einsum('rnvu,rbvu->rbn', spectrum, task._patterns.conj() * half).real
    else:
        statistic = torch.einsum('rnvu,bvu->rbn', spectrum.abs().square(), task._contrasts * half)
    accuracy = ((statistic > 0) == bits).double().mean((0, 2))
    for i, value in enumerate(accuracy.tolist()):
        expected = .5 if i == learn_tasks.EMPTY else IDEAL
        assert abs(value - expected) < 4 * math.sqrt(expected * (1 - expected) / (2 * count))
    assert images.var().item() == pytest.approx(1 if 'texture' in name else images.var().item(), rel=.02)


@pytest.mark.parametrize('kind', ['pattern', 'texture'])
def test_closed_forms_are_what_scipy_integrates(kind):
    """The accuracies at the strengths that were solved for, by distributions that are not those of the module."""
    if kind == 'pattern':
        counts = (learn_tasks.band_masks() * learn_tasks.independent_modes()).sum((1, 2)).tolist()
        for i, (n, w) in enumerate(zip(counts, learn_tasks.pattern_strengths())):
            expected = stats.norm.sf(0, loc=n * w * w, scale=math.sqrt(n * w * w / 2)) if w else .5
            assert expected == pytest.approx(.5 if i == learn_tasks.EMPTY else IDEAL)
    else:
        orientation = learn_tasks.orientation()
        half = learn_tasks.band_masks() * learn_tasks.independent_modes()
        counts, others = ((half * (orientation == sign)).sum((1, 2)).tolist() for sign in (1, -1))
        assert counts == others  # of both orientations
        rng = torch.Generator().manual_seed(0)
        for i, (n, q) in enumerate(zip(counts, learn_tasks.texture_ratios())):
            a, b = (torch.randn(2, int(2 * n), 40_000, generator=rng).square().sum(1))
            expected = .5 if i == learn_tasks.EMPTY else IDEAL
            assert (q * a > b).double().mean().item() == pytest.approx(expected, abs=.008)


def test_texture_bits_are_in_no_mean_and_no_total_power():
    task = BandImages('texture', 'white', [0])
    images, bits = task.images(8000, [torch.Generator().manual_seed(0)])
    power = torch.fft.rfft2(images[0], norm='ortho').abs().square()
    for i in range(len(task.bands)):
        in_band = (power * learn_tasks.band_masks()[i] * learn_tasks.independent_modes()).sum((1, 2))
        one, zero = in_band[bits[0, i] == 1], in_band[bits[0, i] == 0]
        assert stats.ttest_ind(one.numpy(), zero.numpy()).pvalue > 1e-3


@pytest.mark.parametrize('background, slope', [('white', 0), ('pink', -2)])
def test_backgrounds_have_their_spectra(background, slope):
    images, _ = BandImages('texture', background, [0]).images(4000, [torch.Generator().manual_seed(0)])
    power = torch.fft.rfft2(images[0], norm='ortho').abs().square().mean(0)
    x, y = learn_tasks.radii().log().flatten()[1:], power.log().flatten()[1:]
    assert stats.linregress(x, y).slope == pytest.approx(slope, abs=.03)


def test_patches_hold_all_pixels():
    images = torch.randn(2, 3, 16, 16)
    x = learn_tasks.patches(images)
    assert x.shape == (2, 4, 3 * 64)
    assert torch.equal(x[1, :, 64 + 9], images[1, 1, 2:4, 2:4].flatten())  # second image, second row and column


def test_seeds_share_nothing_and_repeat():
    a, b = (BandImages('pattern', 'pink', [0, 1]).batch() for _ in range(2))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0][0], a[0][1])
    task = BandImages('pattern', 'pink', [0])
    assert not torch.equal(task.batch()[1], task.batch()[1])


# --- trainings -------------------------------------------------------------------------------------------------------


def test_a_short_training_learns_and_its_controls_do_not():
    task = BandImages('pattern', 'white', [0, 1, 2, 3])
    found = learn._train(task, 'identity', [1e-2], 60, 1., [0, 60])
    before, after = (torch.tensor(found['values'])[:, i].mean(0) for i in (0, 1))
    chance = 4 * .5 / math.sqrt(4 * task.eval_size)
    assert (before - .5).abs().max() < chance  # untrained: at chance
    assert abs(after[learn_tasks.EMPTY] - .5) < chance  # no signal: at chance
    assert min(after[i] for i in range(5) if i != learn_tasks.EMPTY) > .5 + 2 * chance


def test_a_linear_network_cannot_read_textures():
    task = BandImages('texture', 'white', [0, 1, 2, 3])
    found = learn._train(task, 'identity', [1e-2], 40, 1., [40])
    accuracy = torch.tensor(found['values'])[:, 0].mean(0)
    assert (accuracy - .5).abs().max() < 4 * .5 / math.sqrt(4 * task.eval_size)


def _rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


ARGV = ['--tasks', 'regression', '--variants', 'relu', 'relu*x', 'relu6*x', '--seeds', '0', '1', '2', '--steps', '20',
        '--learning-rates', '0.001', '0.01', '0.1']


@pytest.mark.slow
def test_command_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    argv = [*ARGV, '--output', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', ['/bin/gmnet-timm', *argv])
    assert run_command(parser(), argv) == 0
    printed = capsys.readouterr().out
    assert printed.count(' learning rate ') == 3 and 'error high' in printed
    tables = {path.name: path.read_bytes() for path in tmp_path.glob('*.csv')}
    assert set(tables) == {'regression.csv', 'tuning.csv', 'summary.csv', 'comparisons.csv'}
    rows = _rows(tmp_path / 'comparisons.csv')
    pairs = [('relu*x', 'relu'), ('relu6*x', 'relu'), ('relu6*x', 'relu*x')]
    assert [(row['first'], row['second']) for row in rows] == 2 * pairs  # of two outcomes
    assert {row['family'] for row in rows} == {'6'} and all(float(row['p_holm']) >= float(row['p']) for row in rows)
    conditions = json.loads((tmp_path / 'learn.json').read_text())
    assert conditions['made_by'][0]['command'] == ['python', '-m', 'experiments.learn', *argv]
    assert conditions['settings']['seeds'] == [0, 1, 2]
    assert {row['chosen'] for row in _rows(tmp_path / 'tuning.csv')} == {'0', '1'}

    lost = tmp_path / 'runs' / 'regression-relu-x.json'
    lost.unlink()
    assert run_command(parser(), argv) == 0
    assert capsys.readouterr().out.count(' learning rate ') == 1
    assert {path.name: path.read_bytes() for path in tmp_path.glob('*.csv')} == tables

    assert run_command(parser(), [*argv, '--scale', '2']) == 1 and 'other settings' in capsys.readouterr().err
    assert run_command(parser(), [*argv, '--scale', '2', '--force']) == 0
    assert (tmp_path / 'regression.csv').read_bytes() != tables['regression.csv']


@pytest.mark.parametrize('argv, message', [
    (['--tasks', 'nonsense'], 'The tasks are'), (['--variants', 'nonsense'], 'no activation'),
    (['--seeds', '1', '1000'], 'choose the learning rate'), (['--steps', '5'], 'at least 20'),
    (['--scale', '0'], 'positive scale'), (['--learning-rates', '-1'], 'positive learning rate')])
def test_errors_come_before_the_work(tmp_path, capsys, argv, message):
    assert run_command(parser(), ['--output', str(tmp_path / 'out'), *argv]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_the_learning_rate_is_the_one_with_the_smallest_loss(monkeypatch):
    """Also where it lies beyond those that were given, and where a training diverges."""
    best = .03

    def train(task, variant, rates, steps, scale, marks):
        losses = [math.nan if rate > .5 else abs(math.log(rate / best)) for rate in rates]
        return dict(
            losses=[[loss] * len(marks) for loss in losses for _ in task.seeds],
            values=[[[.5] * 10] * len(marks) for _ in rates for _ in task.seeds],
            parameters=1, pre_gate_std=[1.], beyond_6=[0.])

    monkeypatch.setattr(learn, '_train', train)

    def run(*rates):
        found = learn._run('regression', 'relu', learn.Settings(learning_rates=rates))
        return found['learning_rate'], found['at_edge'], len(learn.tuning_rows([found])) // 2

    assert run(.001, .01, .03, 1.) == (.03, False, 4)
    assert run(.001, .003) == (.027, False, 5)  # .009, .027, .081
    assert run(.4, .2) == (.025, True, 5)
    assert run(.1) == (.1, False, 1)


def test_error_between_points_is_that_of_the_function():
    """A network that knows the sum by heart has none; one that knows it at the points of training only has some."""
    task = create_task('regression', [3])
    (_, on_points), (x, between) = task.at(0.), task.at(.5)
    t = torch.atan2(x[:, 1:], x[:, :1]).double()
    expected = torch.zeros_like(t)
    for i, k in enumerate(task.frequencies):
        phase = 2 * math.pi * torch.rand(
            len(task.frequencies), generator=torch.Generator().manual_seed(1_000_003 + 3), dtype=torch.float64)[i]
        expected += torch.sin(k * t + phase) * math.sqrt(2 / len(task.frequencies))
    assert task.loss(expected.float(), between) < 1e-6
    assert task.loss(on_points, between) > .1


def test_planned_contrasts(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, .01, (6, 12))
    rows = [dict(variant=name, seed=seed, between=value + noise[i, seed])
            for i, (name, value) in enumerate(
                {'relu': .1, 'relu*x': .3, 'relu6*x': .1, 'gelu': .2, 'gelu*x': .1, 'gelu*v': .2}.items())
            for seed in range(12)]
    verdicts = [line.split('|')[-2].strip() for line in contrast_lines(rows)[2:]]
    assert verdicts == ['larger error', 'open', 'smaller error', 'open', 'open']


def test_report_of_the_second_plan_follows_from_its_data():
    folder = ROOT / 'experiments'
    lines = contrast_lines(_rows(folder / 'learn' / 'results' / 'plan-2' / 'between.csv'))
    assert '\n'.join(lines) in (folder / 'README.md').read_text()
