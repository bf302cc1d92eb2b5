"""Configurations, runs and streams that somebody else made: each is used as it is meant, or refused in one line."""
import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from model_helpers import create

from gmnet_timm.cli.main import main

TINY = dict(base_dim=4, depths=[1, 1], mlp_ratios=[2, 2], stem_chs=4)
CONFIG_COMMANDS = [['info', 'FOLDER'], ['verify', 'FOLDER'], ['save', 'FOLDER', 'OUT'],
                   ['convert', 'FOLDER', 'OUT.safetensors']]
RUN_COMMANDS = [['info', 'FOLDER'], ['save', 'FOLDER', 'OUT'], ['check-run', 'FOLDER']]


def run(command, folder, out):
    """Exit status and what was printed; anything but an answer or a one-line error fails the test."""
    shutil.rmtree(out, ignore_errors=True)
    words = [{'FOLDER': str(folder)}.get(word, word.replace('OUT', str(out))) for word in command]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main([*words, *(['--force'] if command[0] == 'convert' else [])])
    errors = [line for line in stderr.getvalue().splitlines() if not line.startswith('note: ')]
    assert status in (0, 1) and len(errors) <= 1 and all(line.startswith('error: ') for line in errors), errors
    assert status == 1 or not errors
    return status, stdout.getvalue()


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create('gmnet_s1', num_classes=3, **TINY)


@pytest.fixture
def folder(model, tmp_path):
    """A published folder."""
    torch.save({'state_dict': model.state_dict(), 'args': {
        'model': 'gmnet_s1', 'num_classes': 3, 'in_chans': 3, 'model_kwargs': TINY}}, tmp_path / 'x.pth.tar')
    assert main(['save', str(tmp_path / 'x.pth.tar'), str(tmp_path / 'folder')]) == 0
    return tmp_path / 'folder'


def values(rng):
    """Values that are of no use where they are put."""
    deep = []
    for _ in range(60):
        deep = [deep]
    return rng.choice([
        None, True, -1, 0, 1, 10 ** 30, -0.5, 1e308, '', 'x' * 5000, [], {},
        'a\n\x1b[31mok      weights: forged\x1b[0m',
        [1, 2, 3], [None], {'a': 1}, deep, '../../etc/passwd', 'hf-hub:nobody/nothing', 'gmnet_s4', [10 ** 9] * 3,
        ['relu'], float('nan'), float('inf'), '<script>alert(1)</script>', '`|`'])


def mutate(content, rng):
    """Replace, remove or add an entry somewhere in a tree of dictionaries and lists."""
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < .7:
            node = node[key]
            continue
        how = rng.random()
        if how < .75:
            node[key] = values(rng)
        elif how < .9:
            del node[key]
        elif isinstance(node, dict):
            node[str(values(rng))[:50]] = values(rng)
        return


def fuzz_configs(folder, model, count, seed):
    rng = random.Random(seed)
    original = json.loads((folder / 'config.json').read_text())
    statuses = []
    for i in range(count):
        config = json.loads(json.dumps(original))
        for _ in range(rng.randint(1, 3)):
            mutate(config, rng)
        text = json.dumps(config)
        if i % 10 == 0:
            text = text[:rng.randrange(len(text))] + rng.choice(['', '}', '[' * 2000, '\x00', '\ud800'])
        (folder / 'config.json').write_text(text, encoding='utf-8', errors='surrogatepass')
        out = folder.with_name('out')
        status, printed = run(CONFIG_COMMANDS[i % len(CONFIG_COMMANDS)], folder, out)
        statuses.append(status)
        assert '\x1b' not in printed and '\nok      weights: forged' not in printed
        if status == 0 and (out / 'config.json').exists():  # what is written is the model
            json.loads((out / 'config.json').read_text(), parse_constant=pytest.fail)
            again = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
            assert torch.equal(again(torch.ones(1, 3, 64, 64)), model(torch.ones(1, 3, 64, 64)))
    return statuses


def fuzz_runs(folder, model, count, seed):
    rng = random.Random(seed)
    run_dir = folder.with_name('run')
    run_dir.mkdir(exist_ok=True)
    args = {'model': 'gmnet_s1', 'num_classes': 3, 'in_chans': 3, 'gp': None, 'model_kwargs': TINY, 'img_size': 64,
            'mean': [.5] * 3, 'std': [.2] * 3, 'interpolation': 'bicubic', 'crop_pct': .9, 'epochs': 3, 'batch_size': 8,
            'lr': .1, 'opt': 'adamw', 'eval_metric': 'top1', 'data_dir': '/data', 'world_size': 1, 'model_ema': False,
            'warmup_epochs': 1, 'cooldown_epochs': 0, 'sched': 'cosine', 'grad_accum_steps': 1, 'dataset': ''}
    laughs = 'a: &a [1]\n' + ''.join(  # a billion of them, once all aliases are followed
        f'{chr(98 + i)}: &{chr(98 + i)} [{", ".join([f"*{chr(97 + i)}"] * 9)}]\n' for i in range(10))
    header = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'
    statuses = []
    for i in range(count):
        changed = json.loads(json.dumps(args))
        for _ in range(rng.randint(1, 3)):
            mutate(changed, rng)
        text = yaml.safe_dump(changed)
        if i % 10 == 0:
            text = rng.choice([
                '[' * 3000, '&a [*a]', laughs, '!!python/object/apply:os.system ["touch canary"]',
                'model: ' + 'x' * 100_000, text[:40], '\x00'])
        (run_dir / 'args.yaml').write_text(text)
        top1 = rng.choice(['10', 'nan', '', 'inf', 'x' * 200_000, '1e400'])
        rows = header + ''.join(f'{epoch},1,1,{top1},50,.1\n' for epoch in range(3))
        rows = rows if rng.random() < .7 else rng.choice(['', 'a,b\n1', '"' * 999, '\0'])
        (run_dir / 'summary.csv').write_text(rows)
        state = {'state_dict': model.state_dict(), 'epoch': rng.choice([2, 'two', None, [], 10 ** 30]),
                 'metric': rng.choice([10., 'x', None, {}, float('nan')]), 'arch': 'gmnet_s1'}
        if rng.random() < .3:
            state['args'] = {key: value for key, value in changed.items() if rng.random() < .9}
        torch.save(state, run_dir / 'last.pth.tar')
        status, _ = run(RUN_COMMANDS[i % len(RUN_COMMANDS)], run_dir, folder.with_name('out'))
        statuses.append(status)
    assert not os.path.exists('canary')
    return statuses


@pytest.mark.parametrize('fuzz', [fuzz_configs, fuzz_runs])
def test_hostile_files(fuzz, folder, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert 1 in fuzz(folder, model, 12, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('fuzz', [fuzz_configs, fuzz_runs])
def test_many_hostile_files(fuzz, folder, model, monkeypatch, tmp_path):
    """Configurations and runs, 120 each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    statuses = fuzz(folder, model, 120, seed=1)
    assert {0, 1} == set(statuses)


def shell(command, **env):
    return subprocess.run(
        ['bash', '-c', command], capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='there is no /dev/full')
@pytest.mark.slow
def test_streams_that_cannot_be_written():
    command = f'{sys.executable} -m gmnet_timm info'
    full = shell(f'{command} > /dev/full')
    assert full.returncode == 1 and full.stderr.count('\n') == 1 and 'cannot be written' in full.stderr
    closed = shell(f'{command} >&-')
    assert 'Traceback' not in closed.stderr
    ascii_only = shell(f"{command} no-such-\u03c3", PYTHONIOENCODING='ascii')
    assert ascii_only.returncode == 1 and '\\u03c3' in ascii_only.stderr and 'Traceback' not in ascii_only.stderr


def test_verify_cannot_be_made_to_print_lines(folder, capsys):
    card = (folder / 'README.md').read_text()
    forged = 'mit\\nok      logits:    all good\\e[32m'
    card = card.replace('library_name: timm\n', f'library_name: timm\nlicense: "{forged}"\n')
    (folder / 'README.md').write_text(card)
    capsys.readouterr()
    main(['verify', str(folder)])
    out = capsys.readouterr().out
    assert 'all good' in out and '\nok      logits:    all good' not in out and '\x1b' not in out


def test_card_cannot_be_broken_out_of(model, tmp_path):
    attack = '</code><script>alert(1)</script> | x | `y` [z](javascript:1)\n# Heading'
    args = {'model': 'gmnet_s1', 'num_classes': 3, 'in_chans': 3, 'model_kwargs': TINY, 'opt': attack, 'epochs': 3}
    torch.save({'state_dict': model.state_dict(), 'args': args}, tmp_path / 'x.pth.tar')
    assert main(['save', str(tmp_path / 'x.pth.tar'), str(tmp_path / 'a`b<i>'), '--train-dataset', attack]) == 0
    body = (tmp_path / 'a`b<i>' / 'README.md').read_text().split('---', 2)[2]
    assert '<script' not in body and '<i>' not in body.split('```')[0]
    assert '\n# Heading' not in body and not re.search(r'(?<!\\)\]\(javascript', body)
    row = next(line for line in body.splitlines() if line.startswith('| opt |'))
    assert row.replace('\\|', '').count('|') == 3
