"""The README's way from nothing to a published model, as printed: fine-tune, check-run, validate, predict, push.

The steps between that need train.py and validate.py are run where TIMM_SCRIPTS names a checkout of timm.
"""
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml

pytest.importorskip('skimage')

from gmnet_timm.cli.main import main
from gmnet_timm.demo import PHOTOS, run_demo

ROOT = Path(__file__).parent.parent
SCRIPTS = os.environ.get('TIMM_SCRIPTS')
CLASSES = ('brick', 'coins', 'grass')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What `make demo` leaves, shorter, and three of its photographs as pictures of somebody's own."""
    folder = tmp_path_factory.mktemp('first-steps')
    run_demo(folder / 'output' / 'demo', patches=32, epochs=1, device='cpu')
    for split in ('train', 'validation'):
        for name in CLASSES:
            shutil.copytree(folder / 'output' / 'demo' / 'data' / split / name, folder / 'data' / split / name)
    shutil.copy(next((folder / 'data' / 'validation' / 'coins').iterdir()), folder / 'photo.png')
    return folder


def command(line):
    """What one of our commands prints, run in this process, which has imported torch already."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(shlex.split(line)[1:]) == 0, line
    return printed.getvalue()


def bash(command, folder):
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'PATH': path}
    result = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', command], cwd=folder, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=280)
    assert result.returncode == 0, result.stdout
    return result.stdout


def readme_lines():
    """The commands of the section about own pictures, by their first word or two."""
    text = (ROOT / 'README.md').read_text()
    block = re.search(r'## Fine-tune on your pictures.*?```bash\n(.*?)```', text, re.DOTALL)[1]
    lines = re.sub(r' +#.*', '', block.replace('\\\n', ' ').replace('photo.jpg', 'photo.png')).strip().splitlines()
    return {' '.join(line.split()[1:2]): line for line in lines}


@pytest.mark.slow
def test_what_needs_no_scripts(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines = readme_lines()
    command(f'{lines["recipe"]} --force')  # in any order of these tests
    recipe = yaml.safe_load((folder / 'finetune.yaml').read_text())
    assert (recipe['num_classes'], recipe['img_size'], recipe['batch_size']) == (3, 96, 8)  # 96 pictures
    started = timm.create_model('gmnet_s1', pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(
        file=str(folder / recipe['pretrained_path'])))
    assert started.num_classes == 3
    assert 'coins' in command('gmnet-timm predict output/demo/model photo.png')
    snippet = re.search(r'```python\n(import timm\nfrom PIL.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)[1]
    (folder / 'snippet.py').write_text(snippet.replace('photo.jpg', 'photo.png'))
    assert bash('python snippet.py', folder).strip() in PHOTOS
    printed = command(f'{lines["push"]} --folder demo'.replace('runs/mine', 'output/demo/run').replace(
        'data/train', 'output/demo/data/train'))
    assert 'nothing was sent' in printed and (folder / 'demo' / 'model.safetensors').exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not SCRIPTS, reason='TIMM_SCRIPTS names no checkout of timm, which has train.py and validate.py')
def test_the_whole_way(folder):
    lines = readme_lines()
    assert list(lines) == ['clone', 'recipe', 'timm-scripts/train.py', 'check-run', 'predict', 'push']
    (folder / 'timm-scripts').mkdir()
    for script in Path(SCRIPTS).glob('*.py'):
        shutil.copy(script, folder / 'timm-scripts')  # away from the checkout's timm
    bash(f'{lines["recipe"]} --force'.replace('--img-size 96', '--img-size 48'), folder)
    bash(lines['timm-scripts/train.py'] + ' --device cpu --epochs 3 --workers 1', folder)
    checked = bash(lines['check-run'], folder)
    assert 'health:            ok' in checked and 'recipe:            as in finetune.yaml' in checked
    assert 'instead of' not in checked
    validate = re.search(r'^validate: +(.*)$', checked, re.MULTILINE)[1]
    accuracy = bash(validate.replace('$TIMM_SCRIPTS', 'timm-scripts') + ' --device cpu --workers 1', folder)
    best = re.search(r'top-1: +best ([\d.]+)', checked)[1]
    assert f'"top1": {float(best):g}' in accuracy.replace('.0,', ',')
    assert any(name in bash(lines['predict'], folder) for name in CLASSES)
    assert 'nothing was sent' in bash(lines['push'], folder)
    config = (folder / 'mine' / 'config.json').read_text()
    assert all(name in config for name in CLASSES)
