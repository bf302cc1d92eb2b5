"""The day when timm ships GmNets of its own: a copy of timm with such a module, and our commands beside it."""
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from model_helpers import create
from PIL import Image
from publishing_helpers import TINY, make_run

import gmnet_timm.gmnet


@pytest.fixture(scope='module')
def other_timm(tmp_path_factory):
    """timm with a gmnet.py as in its pull request: down-samplings without a container, S2 with ratios 3, 3, 3, 2."""
    root = tmp_path_factory.mktemp('other-timm')
    shutil.copytree(Path(timm.__file__).parent, root / 'timm', ignore=shutil.ignore_patterns('__pycache__'))
    code = Path(gmnet_timm.gmnet.__file__).read_text()
    for old, new in (('nn.Sequential(nn.Sequential(downsample), *blocks)', 'nn.Sequential(downsample, *blocks)'),
                     ('depths=(2, 2, 8, 3), mlp_ratios=(3, 3, 3, 3)', 'depths=(2, 2, 8, 3), mlp_ratios=(3, 3, 3, 2)'),
                     ('        pretrained_filter_fn=checkpoint_filter_fn,\n', '')):
        assert code.count(old) == 1
        code = code.replace(old, new)
    start, end = code.index('def checkpoint_filter_fn'), code.index('def _cfg')
    (root / 'timm' / 'models' / 'gmnet.py').write_text(code[:start] + code[end:])
    models = root / 'timm' / 'models' / '__init__.py'
    models.write_text(models.read_text().replace('from .hardcorenas', 'from .gmnet import *\nfrom .hardcorenas', 1))
    return root


@pytest.fixture
def run(other_timm, tmp_path):
    """Python code with `command('info FILE')` for our commands, in a process that has the other timm."""
    def call(code):
        source = str(Path(gmnet_timm.gmnet.__file__).parents[1])
        env = {**os.environ, 'PYTHONPATH': f'{other_timm}:{source}', 'HF_HUB_OFFLINE': '1'}
        result = subprocess.run(
            [sys.executable, '-c', LOGITS + textwrap.dedent(code)], cwd=tmp_path, env=env, capture_output=True,
            text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr
    return call


LOGITS = '''
import sys, timm, torch
from gmnet_timm.cli.main import main
image = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)

def command(line):
    assert main(line.split()) == 0, line

def logits(file, name, **kwargs):
    torch.save(timm.create_model(name, **kwargs).eval()(image).detach(), file)
'''


def image():
    return torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_files_of_both_schemes(run, tmp_path):
    """The authors' files load into timm's models after `convert`, timm's own are GmNets, logits are the same."""
    model = create('gmnet_s1', num_classes=3, **TINY)
    expected = model(image())
    torch.save(model.state_dict(), tmp_path / 'authors.pth')
    kwargs = [f'{key}={value!r}' for key, value in TINY.items()]
    said = run(f"""
        command('info authors.pth')
        command('convert authors.pth timm.safetensors')
        command('save authors.pth authors')
        args = dict(num_classes=3, {', '.join(kwargs)})
        logits('converted.pt', 'gmnet_s1', checkpoint_path='timm.safetensors', **args)
        logits('saved.pt', 'local-dir:authors', pretrained=True)
        own = timm.create_model('gmnet_s1', checkpoint_path='timm.safetensors', **args)
        torch.save(own.state_dict(), 'own.pth')
        command('info own.pth')
        command('convert own.pth back.safetensors --layout authors')
        command('save own.pth own')
        logits('own.pt', 'local-dir:own', pretrained=True)
    """)
    assert said.count("create_model('gmnet_s1'") >= 2
    assert 'stages.0.0.conv.weight' in safetensors.torch.load_file(tmp_path / 'timm.safetensors')
    for file in ('converted.pt', 'saved.pt', 'own.pt'):
        assert torch.equal(torch.load(tmp_path / file), expected), file
    back = safetensors.torch.load_file(tmp_path / 'back.safetensors')
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_s2_goes_by_its_shapes(run, tmp_path):
    """timm's S2 has two thirds of our last stage, and `info` says which one a file is."""
    torch.save(create('gmnet_s2').state_dict(), tmp_path / 'ours.pth')
    said = run("""
        model = timm.create_model('gmnet_s2')
        print(type(model).__module__, *list(model.state_dict())[7:8])
        torch.save(model.state_dict(), 'theirs.pth')
        command('info theirs.pth')
        command('convert theirs.pth a.safetensors')
        print('----')
        command('info ours.pth')
        command('convert ours.pth b.safetensors')
    """)
    assert 'timm.models.gmnet stages.0.0.conv.weight' in said and said.count('timm ships gmnet_s1 itself') == 1
    theirs, ours = said.split('----')
    assert "create_model('gmnet_s2'" in theirs and 'mlp_ratios' not in theirs.splitlines()[1]
    assert 'mlp_ratios' in ours


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_commands(run, tmp_path):
    model = create('gmnet_s1', num_classes=3)
    for name in 'abc':
        (tmp_path / 'data' / name).mkdir(parents=True)
        Image.effect_noise((80, 80), 60).convert('RGB').save(tmp_path / 'data' / name / '0.png')
    run("torch.save(timm.create_model('gmnet_s1', num_classes=3).state_dict(), 'weights.pth')")
    folder = make_run(tmp_path / 'run', model_kwargs={})
    weights = torch.load(tmp_path / 'weights.pth', weights_only=True)
    for checkpoint, metric in (('model_best.pth.tar', 40.25), ('last.pth.tar', 30.125)):
        content = torch.load(folder / checkpoint, weights_only=True)
        torch.save({**content, 'state_dict': weights, 'metric': metric}, folder / checkpoint)
    assert weights.keys() != model.state_dict().keys()  # the names are timm's
    common = '--data-dir data --img-size 64 --workers 0 --no-figure'
    said = run(f"""
        for line in ('push run you/x --dry-run', 'verify x', 'predict run data/a/0.png', 'check-run run',
                     'freq layers run {common}', 'freq amplitude run {common}', 'freq eval run --radii 4 {common}'):
            command(line)
    """)
    assert 'FAILED' not in said and 'nothing was sent' in said
    for part in ('class ', "timm.create_model('gmnet_s1'", '16 gates', '20 blocks', 'top-1 % (95 %)'):
        assert part in said, part
