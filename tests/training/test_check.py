"""gmnet-timm check-run, on run folders written by hand, whose answers are known."""
import argparse
import functools
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import yaml

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.training.check import deviations, format_run, symptoms
from gmnet_timm.training.recipe import load_recipe
from gmnet_timm.weights.runs import read_run

DOCUMENT = Path(__file__).parents[2] / 'docs' / 'training.md'
HEADER = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'


def write_args(folder, **changes):
    args = {**load_recipe('imagenet'), 'model': 'gmnet_s1', 'data_dir': '/data', **changes}
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))


def write_summary(folder, top1, loss=None, first=0):
    loss = loss or [7 - .1 * i for i in range(len(top1))]
    rows = [f'{first + i},{a},{a},{t},{t},0.001\n' for i, (a, t) in enumerate(zip(loss, top1, strict=True))]
    (folder / 'summary.csv').write_text(HEADER + ''.join(rows))


@functools.cache
def small_weights():
    return timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 1, 1), num_classes=3).state_dict()


def write_checkpoint(folder, name, epoch, metric, world_size=8, state_dict=None, args=None, **extra):
    state_dict = small_weights() if state_dict is None else state_dict
    args = argparse.Namespace(**(args or {}), world_size=world_size)
    torch.save(dict(epoch=epoch, metric=metric, args=args, state_dict=state_dict, version=2, **extra), folder / name)


@pytest.fixture
def run(tmp_path):
    """Eight of 310 epochs of the published recipe."""
    write_args(tmp_path)
    write_summary(tmp_path, [.1, 5, 15, 25, 35, 45, 44, 43])
    others = {'head.bias': torch.zeros(3)}  # read in no time
    write_checkpoint(tmp_path, 'last.pth.tar', 7, 43., state_dict=others)
    write_checkpoint(tmp_path, 'checkpoint-5.pth.tar', 5, 45., state_dict=others)
    write_checkpoint(tmp_path, 'model_best.pth.tar', 5, 45.)
    return tmp_path


def report(folder, **kwargs):
    """Texts by name, those of one name joined by a line break."""
    rows = {}
    for name, text in (line.split(':', 1) for line in format_run(read_run(folder), **kwargs).splitlines()):
        rows[name] = f'{rows[name]}\n{text.strip()}' if name in rows else text.strip()
    return rows


def test_healthy_run(run):
    write_checkpoint(run, 'model_best.pth.tar', 5, 45., state_dict=timm.create_model('gmnet_s1').state_dict())
    rows = {key: value.strip() for key, value in report(run).items()}
    assert rows['recipe'] == 'as in imagenet.yaml'
    assert rows['global batch size'] == (
        'world size 8 x batch size 256 x 1 gradient accumulation step = global batch size 2048, as in the recipe')
    assert rows['epochs'] == '8 done, 302 left of 310'
    assert rows['top-1'] == 'best 45.00 (epoch 5), last 43.00 (epoch 7)'
    assert rows['health'] == 'ok: losses are finite'  # only three of eight epochs are after the warm-up
    assert rows['publish'] == f'{run}/model_best.pth.tar (epoch 5, top1 45.00)'
    assert rows['model'] == "timm.create_model('gmnet_s1', in_chans=3, num_classes=1000)"
    assert rows['validate'].startswith('python "$TIMM_SCRIPTS/validate.py" --data-dir /data --model gmnet_s1 ')
    assert '--num-classes 1000 --img-size 224 --crop-pct 0.875' in rows['validate']
    assert 'note' not in rows


def test_deviations_are_named_one_by_one(run):
    write_args(run, epochs=100, mixup=.2, amp=True, amp_dtype='float16', workers=2, opt_betas=[.9, .95])
    assert deviations(read_run(run)) == [
        'opt_betas [0.9, 0.95] instead of [0.9, 0.999]', 'epochs 100 instead of 300', 'mixup 0.2 instead of 0.8',
        'amp True instead of False', 'amp_dtype float16 instead of bfloat16']


def test_learning_rates_scaled_with_the_global_batch_size_are_no_deviation(run):
    batch = 'global batch size 1024 instead of 2048'
    write_args(run, batch_size=128, lr=1.5e-3, warmup_lr=5e-7, min_lr=5e-6)
    assert deviations(read_run(run)) == [batch]
    assert report(run)['global batch size'].endswith('= global batch size 1024, instead of 2048')
    write_args(run, batch_size=128, lr=1e-3)
    assert deviations(read_run(run)) == ['lr 0.001 instead of 0.003', batch]


def test_gradient_accumulation_counts_through_the_global_batch_size(run):
    write_args(run, grad_accum_steps=8)
    assert deviations(read_run(run)) == ['global batch size 16384 instead of 2048']
    write_checkpoint(run, 'last.pth.tar', 7, 43., world_size=1)
    assert deviations(read_run(run)) == []


def test_own_classes_and_weights_are_no_deviation_from_finetune(run):
    own = dict(num_classes=3, pretrained_path='a.pth', class_map='classes.txt', img_size=96, epochs=48, lr=1e-3)
    (run / 'args.yaml').write_text(yaml.safe_dump({**load_recipe('finetune'), **own}))
    assert deviations(read_run(run), 'finetune') == ['lr 0.001 instead of 0.0005']


@pytest.mark.parametrize('changes, found', [
    (dict(model_kwargs=dict(act_layer='gelu')), "model_kwargs {'act_layer': 'gelu'} instead of None"),
    (dict(gp='max'), 'gp max instead of None'),
    (dict(opt_kwargs=dict(caution=True)), "opt_kwargs {'caution': True} instead of None"),
    (dict(split_bn=True), 'split_bn True instead of None'),
    (dict(bn_eps=1e-3), 'bn_eps 0.001 instead of None'),
    (dict(head_init_scale=0.5), 'head_init_scale 0.5 instead of None'),
    (dict(class_map='map.txt'), 'class_map map.txt instead of None'),
    (dict(in_chans=1), 'in_chans 1 instead of None'),
    (dict(train_split='validation'), 'train_split validation instead of None'),
    (dict(interpolation='bilinear'), 'interpolation bilinear instead of bicubic'),
    (dict(crop_pct=.95), 'crop_pct 0.95 instead of 0.875'),
    (dict(opt_eps=1e-3), 'opt_eps 0.001 instead of 1e-08'),
    (dict(remode='const'), 'remode const instead of pixel'),
    (dict(resume='../other/last.pth.tar'), 'resume ../other/last.pth.tar, which is not of this run'),
    (dict(resume='authors.pth', experiment=''), 'resume authors.pth, which is not of this run'),
    (dict(epochs='abc'), 'epochs abc instead of 300'),
    (dict(batch_size=[]), 'batch_size [] instead of 256'),
    (dict(lr=10 ** 90), f'lr {10 ** 90} instead of 0.003'),
    (dict(aa='x' * 5000), f'aa {"x" * 99}… instead of rand-m1-mstd0.5-inc1'),
])
def test_what_changes_network_or_training_is_named(run, changes, found):
    write_args(run, **changes)
    assert deviations(read_run(run)) == [found]
    assert found in report(run)['recipe'].splitlines()  # on a line of its own


@pytest.mark.parametrize('changes', [
    # other spellings of the same, as train.py leaves them in args.yaml
    dict(interpolation='', crop_pct=None, mean=None, std=None, opt_eps=None, opt_betas=None, drop_path=None),
    dict(in_chans=3, model_kwargs={}, opt_kwargs={}, gp=None, train_split='train', bn_momentum=.1),
    # paths, logging and speed
    dict(data='/data', output='runs', experiment='s3', log_wandb=True, workers=2, device='cuda:1', channels_last=True),
    dict(split_bn=False, drop_block=None, in_chans=3), dict(resume='auto'),
    dict(resume='runs/s3/last.pth.tar', experiment='s3'),
    # without effect, given the others
    dict(amp_dtype='float16', pretrained_path='a.pth', momentum=.5, decay_rate=.5),
])
def test_what_changes_neither_is_not_named(run, changes):
    write_args(run, **changes)
    assert report(run)['recipe'] == 'as in imagenet.yaml'


def test_run_folder_itself_is_its_own_start(run):
    write_args(run, resume=f'somewhere/{run.name}/last.pth.tar')
    assert deviations(read_run(run)) == []


def test_arguments_that_args_yaml_lacks_are_named(run):
    args = load_recipe('imagenet')
    for name in ('weight_decay', 'reprob', 'bn_eps'):  # the last is off in the recipe, and in train.py without it
        del args[name]
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    assert deviations(read_run(run)) == ['not recorded: weight_decay, reprob']


def test_global_batch_size_without_checkpoints_needs_the_world_size(run):
    for path in run.glob('*.pth.tar'):
        path.unlink()
    assert report(run)['global batch size'].strip() == (
        'batch size 256 x 1 gradient accumulation step x a world size that no checkpoint records yet: give --gpus')
    assert report(run)['recipe'].strip() == 'as in imagenet.yaml, as far as can be told without the global batch size'
    assert 'world size 4 x batch size 256 x 1 gradient accumulation step = global batch size 1024' in (
        report(run, world_size=4)['global batch size'])
    assert 'no readable checkpoint' in report(run)['publish']
    assert main(['check-run', str(run), '--gpus', '0']) == 1


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


def test_two_classes_well_above_chance_are_no_false_alarm(run):
    write_args(run, num_classes=2)
    write_summary(run, [70] * 8, [5, 4, 3, 2, 1, .9, .8, .7], 10)
    assert symptoms(read_run(run)) == []
    write_summary(run, [52] * 8, [5, 4, 3, 2, 1, .9, .8, .7], 10)
    assert symptoms(read_run(run)) == ['top-1 never left chance (50 %)']


def test_health_claims_no_more_than_was_seen(run):
    for loss, health in (
            ([5, 4, 3, 2, 1], 'ok: losses are finite and still changing'),
            ([5, 4, 3, 2], 'ok: losses are finite'),
            ([''] * 5, 'unknown, no loss is recorded')):
        write_summary(run, [30, 31, 32, 33, 34][:len(loss)], loss, first=10)
        assert report(run)['health'].strip() == health


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


def test_world_size_is_that_of_the_latest_checkpoint(run):
    """A run may be continued on other GPUs; args.yaml is that of the continuation."""
    write_checkpoint(run, 'last.pth.tar', 7, 43., world_size=2)
    assert 'world size 2 x batch size 256' in report(run)['global batch size']


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
    (lambda d: (d / 'model_best.pth.tar').write_bytes((d / 'model_best.pth.tar').read_bytes()[:5000]),
     'model_best.pth.tar cannot be read', None),
    (lambda d: torch.save([1], d / 'model_best.pth.tar'), 'model_best.pth.tar is not a checkpoint of train.py', None),
])
def test_damaged_files_are_named_and_the_rest_is_reported(run, damage, note, lost, capsys):
    damage(run)
    assert main(['check-run', str(run)]) == 0
    out = capsys.readouterr().out
    assert f'note:              {note}' in out
    assert ('unknown without args.yaml' in out) == (lost == 'recipe')
    assert ('no complete epoch yet' in out) == (lost == 'epochs')
    best = 'model_best' if lost else 'checkpoint-5'
    assert f'{run}/{best}.pth.tar (epoch 5' in out


@pytest.mark.parametrize('length', range(0, 2000, 97))
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


def test_ema_weights_are_named(run):
    state_dict = timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 1, 1)).state_dict()
    write_checkpoint(run, 'checkpoint-6.pth.tar', 6, 50., state_dict=state_dict, state_dict_ema=state_dict)
    assert '(epoch 6, top1 50.00, EMA weights)' in report(run)['publish']


@pytest.mark.parametrize('name, value', [
    ('epochs', 'abc'), ('batch_size', []), ('num_classes', {}), ('warmup_epochs', 'x'), ('model', [1]), ('sched', {}),
    ('grad_accum_steps', -3), ('lr', {}), ('opt_betas', 'x'), ('resume', {'a': 1}), ('val_split', [1]),
    ('stop_epoch', []), ('mean', [[[1]]]), ('seed', float('nan')),
])
def test_wrong_types_end_in_a_report_that_names_them(run, name, value, capsys):
    write_args(run, **{name: value})
    assert main(['check-run', str(run)]) == 0
    assert len(re.findall(rf'\b{name}\b', capsys.readouterr().out)) >= 1


@pytest.mark.parametrize('args', [
    dict(eval_metric=[1]), dict(eval_metric={}), dict(experiment=[1], resume=1),
    dict(lr_cycle_limit=2, lr_cycle_mul='x'),
])
def test_other_wrong_types_end_in_a_report(run, args):
    write_args(run, **args)
    assert {'run', 'recipe', 'epochs', 'health', 'publish'} <= report(run).keys()


def test_values_cannot_forge_a_line_or_drive_the_terminal(run):
    write_args(run, model='gmnet_s1\nhealth: ok', aa='\x1b[2Jrand')
    lines = format_run(read_run(run)).splitlines()
    assert all(line.isprintable() for line in lines) and not any(line.startswith('health: ok') for line in lines)
    assert r'(gmnet_s1\nhealth: ok)' in lines[0]


def test_sample_in_the_documentation_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    """The numbers in it are those of a rehearsal that was run; everything else follows from its command lines."""
    text = DOCUMENT.read_text()
    sample = re.search(r'```text\n(run: .*?)```', text, re.DOTALL)[1]
    pattern = r'^python "\$TIMM_SCRIPTS/train.py"((?:.*\\\n)*.*--experiment rehearsal)'
    command = re.search(pattern, text, re.MULTILINE)[1]
    flags = re.findall(r'--([\w-]+) (\S+)', ' '.join(shlex.split(command.replace('\\\n', ''))))
    given = {name.replace('-', '_'): yaml.safe_load(value) for name, value in flags}
    folder = tmp_path / 'runs' / 'rehearsal'
    folder.mkdir(parents=True)
    write_args(folder, **{'model': 'gmnet_s3', **given})
    (best, best_epoch), (last, last_epoch) = re.findall(r'(?:best|last) ([\d.]+) \(epoch (\d+)\)', sample)
    top1 = [10.] * (int(last_epoch) + 1)
    top1[int(best_epoch)], top1[-1] = float(best), float(last)
    write_summary(folder, top1)
    weights = timm.create_model('gmnet_s3', num_classes=given['num_classes']).state_dict()
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    write_checkpoint(folder, 'last.pth.tar', int(last_epoch), float(last), 1, weights, args)
    write_checkpoint(folder, 'model_best.pth.tar', int(best_epoch), float(best), 1, weights, args)
    monkeypatch.chdir(tmp_path)
    assert main(['check-run', 'runs/rehearsal']) == 0
    assert capsys.readouterr().out == sample


def test_folder_of_something_else(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / 'absent'):
        with pytest.raises(UserError, match='is not a run folder of train.py'):
            read_run(folder)
    assert main(['check-run', str(tmp_path)]) == 1
    assert '--experiment' in capsys.readouterr().err
