"""The reader of run folders, on folders written by hand, and on files that somebody wrote to do harm."""
import argparse
import json
import os
import re
import time
import tracemalloc
from random import Random

import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.training.recipe import load_recipe
from gmnet_timm.weights.runs import Epoch, epoch_checkpoints, read_args, read_run, read_summary_lines, read_yaml

SUMMARY = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n0,2.5,2.25,10,50,0.1\n1,1.5,1.25,30,70,0.05\n'


def write_checkpoint(path, epoch=1, metric=30., args=None, **more):
    args = argparse.Namespace(**{'world_size': 4, **(args or {})})
    torch.save(dict(epoch=epoch, metric=metric, args=args, state_dict={}, **more), path)


@pytest.fixture
def run(tmp_path):
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(model='gmnet_s1', epochs=10, batch_size=64)))
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    write_checkpoint(tmp_path / 'last.pth.tar', args=dict(model='gmnet_s1', lr=.1))
    return tmp_path


def test_everything_of_a_run(run):
    write_checkpoint(run / 'checkpoint-0.pth.tar', epoch=0, metric=10., state_dict_ema={})
    found = read_run(run)
    assert found.args == dict(model='gmnet_s1', epochs=10, batch_size=64)
    assert found.epochs[1] == Epoch(
        1, dict(train_loss=1.5, eval_loss=1.25, eval_top1=30., eval_top5=70., lr=.05))
    epoch = found.epochs[1]
    assert (epoch.train_loss, epoch.eval_loss, epoch.top1, epoch.top5, epoch.values['lr']) == (1.5, 1.25, 30, 70, .05)
    first, last = found.checkpoints
    assert (first.path.name, first.epoch, first.metric, first.ema) == ('checkpoint-0.pth.tar', 0, 10., True)
    assert (last.epoch, last.metric, last.ema) == (1, 30., False)
    assert found.best_checkpoint == last
    assert found.world_size == 4 and found.notes == ()


def test_strict_readers_raise_what_the_reader_of_the_folder_notes(run):
    (run / 'args.yaml').write_text('a: [')
    (run / 'summary.csv').unlink()
    found = read_run(run)
    assert [note.split(' cannot be read')[0] for note in found.notes] == ['args.yaml', 'summary.csv']
    assert found.args == {} and found.epochs == () and found.best_epoch is None and found.epochs_planned is None
    for read, name in ((read_args, 'args.yaml'), (read_summary_lines, 'summary.csv')):
        with pytest.raises(UserError, match=f'^{run / name} cannot be read'):
            read(run / name)
    for text, problem in (('', 'is empty'), ('- a', 'holds no arguments')):
        (run / 'args.yaml').write_text(text)
        with pytest.raises(UserError, match=f'args.yaml {problem}'):
            read_args(run / 'args.yaml')


def test_summary_leaves_out_what_is_damaged_and_says_so(run):
    (run / 'summary.csv').write_text(
        f'1,1,1,1,1,1\n{SUMMARY}2,x,1,40,80,0.1\n3,{"9" * 200_000},1,40,80,0.1\n{"9" * 5000},1,1,1,1,1\n-1,1,1,1,1,1\n'
        '4,1\n\n5,,nan,inf,60,0.1\n6,2.0')
    epochs, notes = read_summary_lines(run / 'summary.csv')
    assert [e.epoch for e in epochs] == [0, 1, 5]
    assert epochs[2].train_loss is None and epochs[2].top1 == float('inf') and epochs[2].top5 == 60
    assert notes == [
        'summary.csv: its last line is incomplete and left out',
        'summary.csv: lines 1, 5, 6, 7, 8 and 2 more are damaged and left out']


def test_metric_that_ranks_the_checkpoints(run):
    write_checkpoint(run / 'checkpoint-0.pth.tar', epoch=0, metric=10.)
    for args, best in ((dict(), 1), (dict(eval_metric='top5'), 1), (dict(eval_metric='loss'), 0),
                       (dict(val_split='', eval_metric='top1'), 0)):
        (run / 'args.yaml').write_text(yaml.safe_dump(dict(model='gmnet_s1', **args)))
        assert read_run(run).best_checkpoint.epoch == best, args


def test_world_size_is_that_of_the_last_finished_epoch(run):
    write_checkpoint(run / 'recovery-2-50.pth.tar', epoch=2, metric=None, args=dict(world_size=8))
    write_checkpoint(run / 'tmp.pth.tar', epoch=9, metric=99.)
    assert read_run(run).world_size == 4 and len(read_run(run).checkpoints) == 2
    (run / 'last.pth.tar').unlink()
    assert read_run(run).world_size == 8
    (run / 'recovery-2-50.pth.tar').unlink()
    found = read_run(run)
    assert found.best_checkpoint is None and found.world_size is None


def test_checkpoints_by_epoch_in_numerical_order(run):
    with pytest.raises(UserError, match='holds no checkpoint-EPOCH.pth.tar'):
        epoch_checkpoints(run)
    for name in ('checkpoint-10', 'checkpoint-9', 'checkpoint-x', f'checkpoint-{"9" * 50}'):
        (run / f'{name}.pth.tar').touch()
    assert epoch_checkpoints(run) == {9: run / 'checkpoint-9.pth.tar', 10: run / 'checkpoint-10.pth.tar'}


@pytest.mark.parametrize('name, value', [
    ('epochs', 'abc'), ('batch_size', []), ('num_classes', {}), ('warmup_epochs', 1.5), ('cooldown_epochs', -1),
    ('grad_accum_steps', True), ('stop_epoch', 10 ** 50), ('lr_cycle_limit', float('nan')), ('model', ['gmnet_s1']),
])
def test_wrong_types_in_the_arguments_are_noted(run, name, value):
    (run / 'args.yaml').write_text(yaml.safe_dump({'model': 'gmnet_s1', name: value}))
    found = read_run(run)
    assert len(found.notes) == 1 and found.notes[0].startswith(f'args.yaml: {name} is ')
    assert found.count(name) is None and name in found.args
    assert found.epochs_planned is None


@pytest.mark.parametrize('name, value', [
    ('epoch', 'text'), ('epoch', [1]), ('epoch', -1), ('metric', 'text'), ('metric', [1.]),
    ('metric', float('nan')), ('world_size', 'text'), ('world_size', 2.5),
])
def test_wrong_types_in_a_checkpoint_are_noted(run, name, value):
    entries = dict(epoch=1, metric=30., state_dict={}, args=argparse.Namespace(world_size=4))
    if name == 'world_size':
        entries['args'].world_size = value
    else:
        entries[name] = value
    torch.save(entries, run / 'last.pth.tar')
    found = read_run(run)
    assert found.notes == (f'last.pth.tar: its {name} is not a usable number',)
    assert getattr(found.checkpoints[0], name) is None


@pytest.mark.parametrize('args, planned', [
    (dict(epochs=10), 10),
    (dict(epochs=10, cooldown_epochs=2, sched='cosine'), 12),
    (dict(epochs=10, cooldown_epochs=2, sched='step'), 10),
    (dict(epochs=10, cooldown_epochs=2, sched='wsd'), 12),
    (dict(epochs=10, warmup_epochs=3, warmup_prefix=True), 13),
    (dict(epochs=10, warmup_epochs=3), 10),
    (dict(epochs=10, lr_cycle_limit=3, cooldown_epochs=1), 31),
    (dict(epochs=10, lr_cycle_limit=3, sched='step'), 10),
    (dict(epochs=10, lr_cycle_limit=3, lr_cycle_mul=2.), None),
    (dict(epochs=10, stop_epoch=4), 4),
    (dict(), None),
])
def test_epochs_planned(run, args, planned):
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model='gmnet_s1', **args)))
    assert read_run(run).epochs_planned == planned


@pytest.mark.parametrize('sched', ['cosine', 'tanh', 'poly', 'step', 'multistep', 'wsd'])
@pytest.mark.parametrize('args', [
    dict(), dict(cooldown_epochs=3), dict(warmup_epochs=2, warmup_prefix=True), dict(lr_cycle_limit=2)])
def test_epochs_planned_are_those_of_timms_scheduler(run, sched, args):
    args = dict(sched=sched, epochs=20, **args)
    own_names = dict(epochs='num_epochs', lr_cycle_limit='cycle_limit')
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=.1)
    scheduler, expected = create_scheduler_v2(
        optimizer, **{own_names.get(name, name): value for name, value in args.items()}, decay_epochs=5)
    if scheduler is None:
        pytest.skip(f'this timm has no schedule {sched}')
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(model='gmnet_s1', **args)))
    assert read_run(run).epochs_planned == expected


def alias_bomb(levels=9, width=9):
    lines = ['a0: &a0 [x, x, x, x, x, x, x, x, x]']
    lines += [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * width)}]' for i in range(1, levels)]
    return '\n'.join(lines)


HOSTILE = {
    'alias bomb': alias_bomb(),
    'alias bomb in arguments': alias_bomb() + '\nmodel: gmnet_s1\nmodel_kwargs: {depths: *a8}\naa: *a8\nepochs: *a8\n',
    'alias bomb as a mapping': 'a: &a {x: 1}\nb: {<<: [' + ', '.join(['*a'] * 15_000) + ']}',
    'alias of itself': 'a: &a {b: *a}\nmodel_kwargs: *a\nmodel: gmnet_s1',
    'brackets': 'a: ' + '[' * 1000,
    'many brackets': '[' * 99_000,
    'nested sequences': '- ' * 1000,
    'nested mappings': ''.join(f'{" " * i}a:\n' for i in range(300)),
    'digits': 'epochs: ' + '9' * 6000,
    'hexadecimal digits, which Python reads and cannot print': 'epochs: 0x' + 'f' * 6000 + '\naa: 0x' + 'f' * 6000,
    'sexagesimal': 'epochs: ' + '1:' * 3000 + '1.5',
    'large': 'a: 1\n' * 300_000,
    'tag': '!!bool x',
    'date': 'lr: 2001-99-99',
    'code': '!!python/object/apply:os.system [ls]',
    'list as a key': '[1]: 2',
    'two documents': 'a: 1\n---\nb: 1',
    'not UTF-8': b'\xff',
    'NUL': 'a\0',
}


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow if 'bomb' in name or 'brackets' in name or 'nested' in name else ())
    for name in HOSTILE])
def test_hostile_yaml_ends_in_a_report(tmp_path, name, capsys):
    content = HOSTILE[name]
    (tmp_path / 'args.yaml').write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / 'summary.csv').write_text(SUMMARY)
    write_checkpoint(tmp_path / 'model_best.pth.tar')
    tracemalloc.start()
    start = time.perf_counter()
    assert main(['check-run', str(tmp_path)]) in (0, 1)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert time.perf_counter() - start < 60
    out, err = capsys.readouterr()
    assert out.startswith('run:') and all(len(line) < 1000 for line in out.splitlines()) and 'Traceback' not in err


@pytest.mark.parametrize('name, problem', [
    ('large', 'larger than'), ('tag', 'cannot be read as YAML'), ('code', 'could not determine a constructor'),
    ('list as a key', 'unhashable'), ('two documents', 'another document'), ('not UTF-8', 'decode'),
    ('NUL', 'characters'), ('digits', 'YAML'), ('many brackets', 'YAML')])
def test_yaml_that_is_refused(tmp_path, name, problem):
    content = HOSTILE[name]
    path = tmp_path / 'args.yaml'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=problem) as e:
        read_yaml(path)
    assert str(e.value).startswith(f'{path} cannot be read') and '\n' not in str(e.value) and len(str(e.value)) < 400


def test_yaml_within_bounds_is_what_safe_load_makes_of_it(tmp_path):
    text = 'mean: &m [0.5, 0.25]\nstd: *m\nbase: &b {x: 1}\nother: {<<: *b, y: 0x10}\nlr: 1.0e-3\nnone:\n'
    (tmp_path / 'a.yaml').write_text(text)
    assert read_yaml(tmp_path / 'a.yaml') == yaml.safe_load(text)
    nested = '[' * 50 + ']' * 50
    (tmp_path / 'a.yaml').write_text(nested)
    assert read_yaml(tmp_path / 'a.yaml') == yaml.safe_load(nested)
    (tmp_path / 'a.yaml').write_text('')
    assert read_yaml(tmp_path / 'a.yaml') is None


@pytest.mark.timeout(30)
@pytest.mark.parametrize('name', ['args.yaml', 'summary.csv', 'last.pth.tar'])
def test_pipe_is_not_waited_for(run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    assert re.search('is not a (regular )?file', read_run(run).notes[0])


def test_large_summary_is_not_read(run):
    with (run / 'summary.csv').open('wb') as file:
        file.truncate(200_000_000)
    assert 'larger than' in read_run(run).notes[0]


HOSTILE_VALUES = [
    'abc', '[]', '{}', '[[[]]]', 'null', 'true', '-1', '1.5', '.nan', '.inf', '-.inf', '1e999', '9' * 99, '9' * 200,
    '0x' + 'f' * 90, '2001-01-01', '2001-99-99', '!!binary aGk=', '!!set {a, b}', '!!omap [a: 1]', '!!bool x', '*x',
    '&x [*x]', '"\\e[2J\\n\\0"', '"\\ud800"', "'" + 'x' * 5000 + "'", '? [a]\n: b', '[' * 50, '<<: 1', '1:60:90', '',
    '|\n  a\n  b',
]


def damaged(content, random):
    """Content with something cut, flipped, doubled or inserted."""
    content = bytearray(content)
    for _ in range(random.randint(1, 3)):
        at, end = sorted(random.randrange(len(content) + 1) for _ in range(2))
        kind = random.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content[at:end] = b''
        elif kind == 3:
            content[at:at] = content[at:end]
        else:
            content[at:at] = random.choice(
                [b'\0' * 50, b'"', b'\n', b'\r', b'9' * 5000, b',' * 200_000, b'\xff\xfe', b': &'])
    return bytes(content)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_damaged_or_hostile_run_folders_end_in_a_report(run, capsys):
    """check-run ends with a report or an error of one line, in bounded time."""
    random = Random(0)
    recipe = load_recipe('imagenet')
    originals = {path: path.read_bytes() for path in run.iterdir()}
    reports = 0
    for _ in range(400):
        for path, content in originals.items():
            path.write_bytes(damaged(content, random) if random.random() < .5 else content)
        if random.random() < .7:
            chosen = {random.choice(list(recipe)): random.choice(HOSTILE_VALUES) for _ in range(random.randint(1, 4))}
            lines = [f'{name}: {chosen.get(name, json.dumps(value))}' for name, value in recipe.items()]
            (run / 'args.yaml').write_text('\n'.join(lines), errors='surrogatepass')
        start = time.perf_counter()
        status = main(['check-run', str(run)])
        assert time.perf_counter() - start < 30
        out, err = capsys.readouterr()
        assert status in (0, 1)
        assert (len(out.splitlines()) >= 7 and out.replace('\n', '').isprintable()) or err.count('\n') == 1
        reports += bool(out)
    assert reports > 360
