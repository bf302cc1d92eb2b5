"""gmnet-timm check-run, on run folders written by hand, whose answers are known."""
import argparse
import sys

import pytest
import timm
import torch
import yaml

from gmnet_timm.cli.main import main
from gmnet_timm.errors import MissingExtraError, UserError
from gmnet_timm.training.recipe import load_recipe
from gmnet_timm.training.run import deviations, format_run, plot_run, read_run, symptoms

HEADER = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'


def write_args(folder, **changes):
    args = {**load_recipe('imagenet'), 'model': 'gmnet_s1', 'data_dir': '/data', **changes}
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))


def write_summary(folder, top1, loss=None, first=0):
    loss = loss or [7 - .1 * i for i in range(len(top1))]
    rows = [f'{first + i},{a},{a},{t},{t},0.001\n' for i, (a, t) in enumerate(zip(loss, top1, strict=True))]
    (folder / 'summary.csv').write_text(HEADER + ''.join(rows))


def write_checkpoint(folder, name, epoch, metric, world_size=8, state_dict=None, **extra):
    if state_dict is None:
        state_dict = timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 1, 1), num_classes=3).state_dict()
    args = argparse.Namespace(world_size=world_size, model='gmnet_s1')
    torch.save(dict(epoch=epoch, metric=metric, args=args, state_dict=state_dict, version=2, **extra), folder / name)


@pytest.fixture
def run(tmp_path):
    """Eight of 310 epochs of the published recipe."""
    write_args(tmp_path)
    write_summary(tmp_path, [.1, 5, 15, 25, 35, 45, 44, 43])
    write_checkpoint(tmp_path, 'last.pth.tar', 7, 43.)
    write_checkpoint(tmp_path, 'checkpoint-5.pth.tar', 5, 45.)
    write_checkpoint(tmp_path, 'model_best.pth.tar', 5, 45.)
    return tmp_path


def report(folder, **kwargs):
    return dict(line.split(':', 1) for line in format_run(read_run(folder), **kwargs).splitlines())


def test_healthy_run(run):
    rows = {key: value.strip() for key, value in report(run).items()}
    assert rows['recipe'] == 'as in imagenet.yaml'
    assert rows['images a step'] == '8 GPUs x batch 256 x accumulation 1 = 2048 images a step, as in the recipe'
    assert rows['epochs'] == '8 done, 302 left of 310'
    assert rows['top-1'] == 'best 45.00 (epoch 5), last 43.00 (epoch 7)'
    assert rows['health'] == 'losses are finite, and it is not flat'
    assert rows['publish'].startswith(f'{run}/model_best.pth.tar (epoch 5, top1 45.00), no registered model, nearest')
    assert 'note' not in rows


def test_deviations_are_named_one_by_one(run):
    write_args(run, epochs=100, mixup=.2, amp=True, amp_dtype='float16', workers=2, opt_betas=[.9, .95])
    assert deviations(read_run(run)) == [
        'opt_betas [0.9, 0.95] instead of [0.9, 0.999]', 'epochs 100 instead of 300', 'mixup 0.2 instead of 0.8',
        'amp True instead of False', 'amp_dtype float16 instead of bfloat16']


def test_learning_rates_scaled_with_the_total_are_no_deviation(run):
    write_args(run, batch_size=128, lr=1.5e-3, warmup_lr=5e-7, min_lr=5e-6)
    assert deviations(read_run(run)) == []
    assert report(run)['images a step'].endswith('= 1024 images a step, instead of 2048')
    write_args(run, batch_size=128, lr=1e-3)
    assert deviations(read_run(run)) == ['lr 0.001 instead of 0.003']


def test_own_classes_and_weights_are_no_deviation_from_finetune(run):
    own = dict(num_classes=3, pretrained_path='a.pth', lr=1e-3)
    (run / 'args.yaml').write_text(yaml.safe_dump({**load_recipe('finetune'), **own}))
    assert deviations(read_run(run), 'finetune') == ['lr 0.001 instead of 0.0005']


def test_total_without_checkpoints_needs_the_number_of_gpus(run):
    for path in run.glob('*.pth.tar'):
        path.unlink()
    assert 'or --gpus' in report(run)['images a step']
    assert '4 GPUs x batch 256 x accumulation 1 = 1024' in report(run, processes=4)['images a step']
    assert 'no readable checkpoint' in report(run)['publish']


@pytest.mark.parametrize('changes, planned', [
    (dict(), 310),
    (dict(warmup_prefix=True), 315),
    (dict(sched='step'), 300),
    (dict(epochs=20, cooldown_epochs=0), 20),
])
def test_epochs_planned(run, changes, planned):
    write_args(run, **changes)
    assert read_run(run).epochs_planned == planned


@pytest.mark.parametrize('top1, loss, found', [
    ([.1, 1, 2], [7, float('nan'), float('nan')], 'the loss is not finite from epoch 1 on'),
    ([.1, 1, 2], [7, float('inf'), 5], 'the loss is not finite from epoch 1 on'),
    ([.1] * 9, None, 'top-1 never left chance (0.1 %)'),
    ([1, 10, 20, 30, 4], None, 'top-1 fell from 30.00 to 4.00'),
    ([1, 5, 10, 20, 30, *[30.01] * 5], [7, 6, 5, 4.5, 4, 3, 3.001, 3, 2.999, 3], 'flat: neither loss nor top-1 moved'),
])
def test_symptoms(run, top1, loss, found, capsys):
    write_summary(run, top1, loss)
    assert len(symptoms(read_run(run))) == 1
    assert symptoms(read_run(run))[0].startswith(found)
    assert main(['check-run', str(run)]) == 1
    assert found in capsys.readouterr().out


@pytest.mark.parametrize('top1, loss, first', [
    ([.1, .1, .1], None, 0),  # still in the warm-up
    ([30, 30, 30, 30, 30], [5, 4, 3, 2, 1], 10),  # the loss still falls
    ([30, 31, 32, 33, 34], [3, 3, 3, 3, 3], 10),  # top-1 still rises
    ([75] * 8, [2] * 8, 302),  # the cool-down is meant to be flat
    ([30] * 4, [3] * 4, 10),  # too short to say
])
def test_no_false_alarm(run, top1, loss, first):
    write_summary(run, top1, loss, first)
    assert symptoms(read_run(run)) == []


def test_resumed_summary_repeats_its_header_and_an_epoch(run):
    write_summary(run, [1, 2, 3])
    with (run / 'summary.csv').open('a') as f:
        f.write(HEADER + '2,5,5,33,50,0.001\n3,4,4,34,50,0.001\n')
    epochs = read_run(run).epochs
    assert [(e.epoch, e.top1) for e in epochs] == [(0, 1), (1, 2), (2, 33), (3, 34)]


def test_model_best_of_a_resumed_run_may_not_be_the_best(run):
    """Older train.py forget the best result when they resume, and overwrite model_best with the first one after it."""
    write_checkpoint(run, 'model_best.pth.tar', 6, 44.)
    assert f'{run}/checkpoint-5.pth.tar' in report(run)['publish']


def test_number_of_gpus_is_that_of_the_latest_checkpoint(run):
    """A run may be continued on other GPUs; args.yaml is that of the continuation."""
    write_checkpoint(run, 'last.pth.tar', 7, 43., world_size=2)
    assert '2 GPUs x batch 256' in report(run)['images a step']


def test_lower_is_better_for_eval_metric_loss(run):
    write_args(run, eval_metric='loss')
    assert f'{run}/last.pth.tar' in report(run)['publish']


@pytest.mark.parametrize('damage, note, lost', [
    (lambda d: (d / 'args.yaml').write_text(''), 'args.yaml is empty', 'recipe'),
    (lambda d: (d / 'args.yaml').write_text('a: [1,'), 'args.yaml cannot be read', 'recipe'),
    (lambda d: (d / 'args.yaml').unlink(), 'args.yaml cannot be read', 'recipe'),
    (lambda d: (d / 'summary.csv').write_text(''), 'summary.csv is empty', 'epochs'),
    (lambda d: (d / 'summary.csv').unlink(), 'summary.csv cannot be read', 'epochs'),
    (lambda d: (d / 'model_best.pth.tar').write_bytes(b''), 'model_best.pth.tar cannot be read', None),
    (lambda d: (d / 'model_best.pth.tar').write_bytes((d / 'last.pth.tar').read_bytes()[:5000]),
     'model_best.pth.tar cannot be read', None),
    (lambda d: torch.save([1], d / 'model_best.pth.tar'), 'model_best.pth.tar is no checkpoint of train.py', None),
])
def test_damaged_files_are_named_and_the_rest_is_reported(run, damage, note, lost, capsys):
    damage(run)
    assert main(['check-run', str(run)]) == 0
    out = capsys.readouterr().out
    assert f'note:          {note}' in out
    assert ('unknown without args.yaml' in out) == (lost == 'recipe')
    assert ('no complete epoch yet' in out) == (lost == 'epochs')
    best = 'model_best' if lost else 'checkpoint-5'
    assert f'{run}/{best}.pth.tar (epoch 5' in out


@pytest.mark.parametrize('length', range(0, 2000, 37))
def test_args_cut_anywhere(run, length):
    """Whatever a half-written args.yaml ends in, the report comes."""
    text = (run / 'args.yaml').read_text()
    (run / 'args.yaml').write_text(text[:length])
    assert len(report(run)) >= 7


@pytest.mark.parametrize('tail', ['8,2.5,2.4', '8,2.5,2.4,46,70,0.0', '8,x,2.4,46,70,0.001\n', '\0\0\0\0', '8\n'])
def test_half_written_summary_line_is_left_out(run, tail):
    with (run / 'summary.csv').open('a') as f:
        f.write(tail)
    result = read_run(run)
    assert [e.epoch for e in result.epochs] == list(range(8))
    assert len(result.notes) == (0 if tail.startswith('\0') else 1)


def test_checkpoint_that_would_run_code_is_refused(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')

    torch.save(dict(epoch=9, metric=99., state_dict={}, args=Evil()), run / 'checkpoint-9.pth.tar')
    result = read_run(run)
    assert not (tmp_path / 'ran').exists()
    assert result.best_checkpoint.epoch == 5
    assert result.notes[0].startswith('checkpoint-9.pth.tar cannot be read')


def test_weights_that_are_not_finite_are_not_for_publishing(run):
    state_dict = timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 1, 1)).state_dict()
    state_dict['head.bias'][0] = float('nan')
    write_checkpoint(run, 'checkpoint-6.pth.tar', 6, 50., state_dict=state_dict)
    publish = report(run)['publish'].strip()
    assert publish.startswith('not ') and 'NaN or infinite values in head.bias' in publish


def test_checkpoint_of_another_model_is_not_for_publishing(run):
    write_checkpoint(run, 'checkpoint-6.pth.tar', 6, 50., state_dict={'fc.weight': torch.zeros(2, 2)})
    assert 'This is not a GmNet' in report(run)['publish']


def test_averaged_weights_are_named(run):
    state_dict = timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 1, 1)).state_dict()
    write_checkpoint(run, 'checkpoint-6.pth.tar', 6, 50., state_dict=state_dict, state_dict_ema=state_dict)
    assert '(epoch 6, top1 50.00, averaged weights)' in report(run)['publish']


def test_folder_of_something_else(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / 'absent'):
        with pytest.raises(UserError, match='is no run folder of train.py'):
            read_run(folder)
    assert main(['check-run', str(tmp_path)]) == 1
    assert '--experiment' in capsys.readouterr().err


def test_plot_draws_the_numbers_of_the_summary(run, tmp_path, monkeypatch):
    figure = pytest.importorskip('matplotlib.figure')
    drawn = []
    save = figure.Figure.savefig

    def keep(self, *args, **kwargs):
        drawn.append([[list(line.get_ydata()) for line in axes.lines] for axes in self.axes])
        return save(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, 'savefig', keep)
    assert main(['check-run', str(run), '--plot', str(tmp_path / 'run.png')]) == 0
    losses = [7 - .1 * i for i in range(8)]
    assert drawn == [[[losses, losses], [[.1, 5, 15, 25, 35, 45, 44, 43]], [[.001] * 8]]]
    assert (tmp_path / 'run.png').read_bytes().startswith(b'\x89PNG')


def test_plot_says_what_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(MissingExtraError, match=r'gmnet-timm\[plot\]'):
        plot_run(read_run(run), 'run.png')
    monkeypatch.undo()
    pytest.importorskip('matplotlib')
    with pytest.raises(UserError, match='Cannot write'):
        plot_run(read_run(run), run / 'args.yaml' / 'run.png')
    (run / 'summary.csv').unlink()
    with pytest.raises(UserError, match='nothing to draw'):
        plot_run(read_run(run), 'run.png')
