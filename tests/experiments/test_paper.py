"""The scripts that make the paper's figures: what they would run, and one of them run on the photographs."""
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.command import run_command
from experiments.paper.__main__ import parser
from gmnet_timm.demo import PHOTOS, prepare_photo_patches
from gmnet_timm.training.recipe import compose_recipe, load_recipe, plan_layout

SCRIPTS = os.environ.get('TIMM_SCRIPTS')


def test_frequency_recipe_is_the_published_one_with_100_epochs_and_all_checkpoints():
    differs = dict(model='resnet18', epochs=100, cooldown_epochs=0, checkpoint_hist=1000)
    assert load_recipe('frequency') == {**load_recipe('imagenet'), **differs}
    header = compose_recipe('resnet18_ewp', plan_layout(8, 256), 'frequency').split('\nmodel:')[0]
    assert 'OUR RECONSTRUCTION' in header and 'is not one' not in header


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2', 'activations', 'gates'])
def test_script_trains_each_model_of_the_figure_and_evaluates_it(name, capsys):
    assert run_command(parser(), [name, '--gpus', '8', '--data-dir', '/data/image net', '--train-flags=--amp']) == 0
    script = capsys.readouterr().out
    subprocess.run(['bash', '-n'], input=script, text=True, check=True)
    lines = [shlex.split(line) for line in script.replace('\\\n', ' ').splitlines() if not line.startswith('#')]
    trainings = [line for line in lines if line[:1] == ['torchrun']]
    assert len(trainings) == 4
    kwargs = set()
    for line in trainings:
        assert '--nproc_per_node=8' in line and line[line.index('--data-dir') + 1] == '/data/image net'
        assert line[-2:] == ['--amp', '${resume[@]}']
        kwargs.add(tuple(line[line.index('--model-kwargs') + 1:-2]) if '--model-kwargs' in line else ())
    final = lines[-1]
    runs = [argument.removeprefix('runs/').removesuffix('/last.pth.tar') for argument in final[3:7]]
    assert [line[line.index('--experiment') + 1] for line in trainings] == runs
    recipes = [line for line in lines if line[:2] == ['gmnet-timm', 'recipe']]
    if name in ('resnet18', 'mobilenetv2'):
        assert final[:3] == ['gmnet-timm', 'freq', 'curves'] and final[final.index('--radii') + 1] == '10'
        assert {line[line.index('--recipe') + 1] for line in recipes} == {'frequency'} and kwargs == {()}
        assert [line[2].removeprefix(recipes[0][2]) for line in recipes] == ['', '_ewp', '_gate_relu6', '_gate_gelu']
    else:
        assert final[:3] == ['gmnet-timm', 'freq', 'eval'] and {line[2] for line in recipes} == {'gmnet_s3'}
        assert len(kwargs) == 4  # one of them is the model as it is


def lines_of(script):
    subprocess.run(['bash', '-n'], input=script, text=True, check=True)
    return [shlex.split(line) for line in script.replace('\\\n', ' ').splitlines() if not line.startswith('#')]


def test_seeds_radii_and_flags_over_several_lines(capsys):
    argv = ['resnet18', '--seeds', '1', '2', '--radii', '6', '10', "--train-flags=--amp\n    --workers 4"]
    assert run_command(parser(), argv) == 0
    lines = lines_of(capsys.readouterr().out)
    trainings = [line for line in lines if line[:1] == ['python']]
    assert [line[line.index('--seed') + 1] for line in trainings] == ['1', '2'] * 4
    assert all(line[-4:] == ['--amp', '--workers', '4', '${resume[@]}'] for line in trainings)
    final = lines[-1]
    assert [line[line.index('--experiment') + 1] for line in trainings] == [
        run.removeprefix('runs/') for run in final[3:11]]
    groups = final[final.index('--groups') + 1:final.index('--output')]
    assert groups == [run.removeprefix('runs/').rpartition('-')[0] for run in final[3:11]]
    assert final[final.index('--radii') + 1:final.index('--groups')] == ['6', '10']


def test_bands_and_figure_1(capsys):
    import timm
    assert run_command(parser(), ['bands']) == 0
    script = capsys.readouterr().out
    final = lines_of(script)[-1]
    assert 'EfficientMod is not in timm' in script and not timm.list_models('*efficientmod*')
    assert final[3:6] == ['runs/gmnet_s3/last.pth.tar', 'starnet_s4.in1k', 'mobileone_s2.apple_in1k']
    assert run_command(parser(), ['figure1']) == 0
    final = lines_of(capsys.readouterr().out)[-1]
    assert final[:3] == ['gmnet-timm', 'freq', 'image'] and set(final[5:6]) <= set(timm.list_pretrained('resnet18*'))


def test_unknown_figure_and_impossible_layout_are_refused(capsys):
    assert run_command(parser(), ['figure7']) == 1
    assert 'Figures: figure1, resnet18, mobilenetv2, activations, gates, bands' in capsys.readouterr().err
    assert run_command(parser(), ['resnet18', '--gpus', '3']) == 1
    assert 'not 2048' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not SCRIPTS, reason='TIMM_SCRIPTS names no checkout of timm, which has train.py')
def test_figure_from_the_photographs_end_to_end(tmp_path):
    """Four trainings of two epochs, then the curves of all epochs; one training is lost after its first epoch."""
    for script in Path(SCRIPTS).glob('*.py'):
        shutil.copy(script, tmp_path)  # away from the checkout's timm
    prepare_photo_patches(tmp_path / 'data', patches=32)
    env = dict(
        os.environ, TIMM_SCRIPTS=str(tmp_path), OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1',
        PYTHONPATH=str(Path(__file__).parents[2]),
        PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    flags = (
        f'--epochs 2 --warmup-epochs 0 --num-classes {len(PHOTOS)} --img-size 64 --batch-size 64 --grad-accum-steps 1 '
        '--workers 1 --device cpu --model-kwargs channels=[8,8,16,16] layers=[1,1,1,1]')

    def make(sections=None):
        script = subprocess.run(
            [sys.executable, '-m', 'experiments.paper', 'resnet18', '--data-dir', 'data', '--train-flags', flags],
            cwd=tmp_path, env=env, text=True, capture_output=True, check=True).stdout
        script = '\n\n'.join(script.split('\n\n')[:sections])  # the head, one for each training, the evaluation
        done = subprocess.run(
            ['bash'], input=script, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    make()
    runs = sorted(path.name for path in (tmp_path / 'runs').iterdir() if path.is_dir())
    assert runs == [f'resnet18{gate}-frequency' for gate in ('', '_ewp', '_gate_gelu', '_gate_relu6')]
    assert yaml.safe_load((tmp_path / 'runs' / f'{runs[1]}.yaml').read_text())['model'] == 'resnet18_ewp'
    with (tmp_path / 'figures' / 'resnet18' / 'curves.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert {(row['model'], row['epoch'], row['band']) for row in rows} == {
        (run.removesuffix('-frequency'), epoch, band)
        for run in runs for epoch in ('0', '1') for band in ('raw', 'low', 'high')}
    assert (tmp_path / 'figures' / 'resnet18' / 'curves.png').stat().st_size > 10000
    # a training that was lost after its first epoch goes on from there, a finished one is left alone
    lost = tmp_path / 'runs' / runs[0]
    (lost / 'checkpoint-1.pth.tar').unlink()
    shutil.copy(lost / 'checkpoint-0.pth.tar', lost / 'last.pth.tar')
    before = (tmp_path / 'runs' / runs[1] / 'last.pth.tar').stat().st_mtime_ns
    printed = make(sections=3)
    assert len(re.findall(r'^Train: 1 .* 0/', printed, re.MULTILINE)) == 1
    assert (lost / 'checkpoint-1.pth.tar').is_file()
    assert (tmp_path / 'runs' / runs[1] / 'last.pth.tar').stat().st_mtime_ns == before
