"""timm's own scripts, unmodified, train and use GmNets. TIMM_SCRIPTS names the checkout of timm that has them.

The scripts are copied away from the checkout's timm package, so that they run with the timm that is installed.
"""
import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.models import load_state_dict, save_for_hf
from train_parser import problems_of

import gmnet_timm.training.recipe
from gmnet_timm.demo import PHOTOS, prepare_photo_patches
from gmnet_timm.training.check import deviations, symptoms
from gmnet_timm.training.recipe import RECIPES, compose_recipe, load_recipe, plan_layout
from gmnet_timm.weights.architecture import infer_architecture
from gmnet_timm.weights.runs import read_run

SCRIPTS = os.environ.get('TIMM_SCRIPTS')
pytestmark = pytest.mark.skipif(not SCRIPTS, reason='TIMM_SCRIPTS names no checkout of timm, which has the scripts')

RECIPES_DIR = Path(gmnet_timm.training.recipe.__file__).with_name('recipes')
RECIPE_FILES = {name: str(RECIPES_DIR / f'{name}.yaml') for name in RECIPES}
CLASSES = sorted(PHOTOS)
TINY = ['--model', 'gmnet_s1', '--model-kwargs', 'base_dim=8', 'depths=[1,1,1,1]']
ONE_EPOCH = ['--epochs', '1', '--warmup-epochs', '0', '--cooldown-epochs', '0']
PLAIN = ['--no-aug', '--mixup', '0', '--cutmix', '0', '--reprob', '0', '--smoothing', '0']
MODEL = ['--model', 'gmnet_s1', '--num-classes', str(len(CLASSES)), '--img-size', '32', '--device', 'cpu']


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with the scripts, and the demo's photo patches in `data`."""
    folder = tmp_path_factory.mktemp('scripts')
    for script in Path(SCRIPTS).glob('*.py'):
        shutil.copy(script, folder)
    prepare_photo_patches(folder / 'data', patches=40)
    return folder


@pytest.fixture(scope='module')
def run(work):
    """Runs a script in `work`; returns what it printed."""
    def run_script(script, *argv, processes=1, check=True):
        command = [sys.executable, script]
        if processes > 1:
            launcher = str(Path(__file__).parents[1] / 'train_on_cpus.py')
            torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
            command = [sys.executable, *torchrun, launcher, script]
        done = subprocess.run(
            [*command, *map(str, argv)], cwd=work, env=environment(), text=True, timeout=280,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0 or not check, done.stdout[-3000:]
        return done.stdout

    return run_script


@pytest.fixture(scope='module')
def train(work, run):
    """Trains from a recipe with command-line flags; returns the run folder."""
    def train_recipe(name, *flags, recipe='imagenet', processes=1):
        run('train.py', *train_args(name, recipe), *flags, processes=processes)
        return work / 'runs' / name

    return train_recipe


@pytest.fixture(scope='module')
def trained(train):
    """A gmnet_s1 trained by the published recipe, shortened."""
    epochs = ['--epochs', '8', '--warmup-epochs', '1', '--cooldown-epochs', '1']
    return train('trained', '--model', 'gmnet_s1', *epochs)


@pytest.fixture(scope='module')
def plain(train):
    """What a tiny model reaches in one epoch without any flag: the reference for those with one."""
    return train('plain', *TINY, *ONE_EPOCH)


def environment():
    # The entry point makes the models known, so that no script needs to be told of gmnet_timm.
    return dict(os.environ, OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1')


def train_args(name, recipe='imagenet'):
    return [
        '-c', RECIPE_FILES[recipe], '--data-dir', 'data', '--num-classes', str(len(CLASSES)), '--img-size', '32',
        '--batch-size', '32', '--workers', '0', '--device', 'cpu', '--output', 'runs', '--experiment', name]


def summary(folder):
    with (folder / 'summary.csv').open() as f:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(f)]


def checkpoint(folder, name='last'):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / f'{name}.pth.tar', map_location='cpu', weights_only=True)


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_value_of_a_recipe_arrives_as_the_command_line_would_set_it(work, recipe):
    """Through the script's own loading of the file, and again as flags: names, types and choices must agree."""
    flags = []
    for key, value in load_recipe(recipe).items():
        if value is True:
            flags.append(f'--{key.replace("_", "-")}')
        elif value is not None and value is not False and value != {}:
            values = value if isinstance(value, list) else [value]
            flags += [f'--{key.replace("_", "-")}', *map(str, values)]
    code = (
        'import json, runpy, sys; script = runpy.run_path("train.py", run_name="train"); seen = []\n'
        'for argv in (json.loads(a) for a in sys.argv[1:]):\n'
        '    sys.argv = ["train.py", *argv]; seen.append(vars(script["_parse_args"]()[0]))\n'
        'print(json.dumps(seen))'
    )
    # Flags first: the file's values stay behind in the parser as its defaults.
    argv = [json.dumps(flags), json.dumps(['-c', RECIPE_FILES[recipe]])]
    out = subprocess.run(
        [sys.executable, '-c', code, *argv], cwd=work, env=environment(), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    from_flags, from_file = json.loads(out.stdout.splitlines()[-1])
    for key, value in load_recipe(recipe).items():
        assert json.dumps(from_file[key]) == json.dumps(value), key
        assert json.dumps(from_flags[key]) == json.dumps(value), key  # 300 is not 300.0
    if recipe != 'finetune':  # and a run with all that the script adds has no difference
        (work / f'as-{recipe}').mkdir()
        (work / f'as-{recipe}' / 'args.yaml').write_text(yaml.safe_dump(from_file))
        assert deviations(read_run(work / f'as-{recipe}'), recipe, RECIPES[recipe] // from_file['batch_size']) == []


@pytest.mark.parametrize('recipe', RECIPES)
def test_train_py_knows_every_argument(work, recipe):
    composed = yaml.safe_load(compose_recipe('gmnet_s2', plan_layout(3, 7, scale_lr=True), recipe))
    assert problems_of(composed, work / 'train.py') == []
    assert problems_of({**composed, 'warmup_epoch': 5, 'lr': '3e-3'}, work / 'train.py') == [
        'warmup_epoch is not an argument', 'lr is text']


@pytest.mark.slow
def test_published_recipe_trains_and_learns(trained):
    rows = summary(trained)
    assert [row['epoch'] for row in rows] == list(range(9))
    assert rows[-1]['train_loss'] < rows[0]['train_loss'] - .2
    assert max(row['eval_top1'] for row in rows) > 3 * 100 / len(CLASSES)  # three times chance
    run = read_run(trained)
    assert run.world_size == 1 and run.epochs_planned == 9 and symptoms(run) == [] and run.notes == ()
    assert run.best_checkpoint.metric == run.best_epoch.top1 == max(row['eval_top1'] for row in rows)
    assert [deviation.split(' ')[0] for deviation in deviations(run)] == [
        'num_classes', 'img_size', 'epochs', 'warmup_epochs', 'cooldown_epochs', 'global']


@pytest.mark.slow
def test_learning_rate_of_every_epoch_is_the_schedule_of_the_recipe(trained):
    expected = [1e-6] + [1e-5 + (3e-3 - 1e-5) * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(1, 8)] + [1e-5]
    assert [row['lr'] for row in summary(trained)] == pytest.approx(expected)


@pytest.mark.slow
def test_finetune_recipe_learns_other_classes_from_local_weights(work, train, trained):
    """Three of the photographs as classes, from weights that know all."""
    for split in ('train', 'validation'):
        for name in CLASSES[::3]:
            (work / 'three' / split).mkdir(parents=True, exist_ok=True)
            (work / 'three' / split / name).symlink_to(work / 'data' / split / name)
    weights = trained / 'model_best.pth.tar'
    flags = [
        '--model', 'gmnet_s1', '--data-dir', 'three', '--num-classes', '3', '--batch-size', '8', '--epochs', '6',
        '--warmup-epochs', '1', '--checkpoint-hist', '6', '--pretrained-path', weights]
    tuned = train('tuned', *flags, recipe='finetune')
    assert max(row['eval_top1'] for row in summary(tuned)) > 2 * 100 / 3  # twice chance
    # The first epoch runs at the learning rate of the warm-up: what it starts from is hardly moved.
    first, start = checkpoint(tuned, 'checkpoint-0')['state_dict'], load_state_dict(str(weights))
    assert first['head.weight'].shape == (3, 320)
    assert torch.allclose(first['stages.2.1.f1.conv.weight'], start['stages.2.1.f1.conv.weight'], atol=1e-4)
    groups = checkpoint(tuned)['optimizer']['param_groups']
    scales = sorted({group['lr_scale'] for group in groups})
    assert scales[-1] == 1 and scales[0] < .2  # layer decay reaches the stem
    assert all(group['lr'] == pytest.approx(groups[-1]['lr'] * group['lr_scale']) for group in groups)


@pytest.mark.slow
def test_fast_variant_trains(train, plain):
    fast = train('fast', *TINY, *ONE_EPOCH, recipe='imagenet-fast')
    args = checkpoint(fast)['args']
    assert args.amp and args.amp_dtype == 'bfloat16' and args.channels_last and args.torchcompile == 'inductor'
    assert summary(fast)[0]['train_loss'] == pytest.approx(summary(plain)[0]['train_loss'], rel=.02)


def same_loss(tolerance):
    def check(folder, plain):
        loss, reference = summary(folder)[0]['train_loss'], summary(plain)[0]['train_loss']
        assert loss == pytest.approx(reference, rel=tolerance)
    return check


def other_loss(folder, plain):
    assert summary(folder)[0]['train_loss'] != summary(plain)[0]['train_loss']


def half_precision(folder, plain):
    same_loss(.02)(folder, plain)
    other_loss(folder, plain)


def recomputed(folder, plain):
    same_loss(1e-4)(folder, plain)
    steps = {key: int(value) for key, value in checkpoint(folder)['state_dict'].items() if 'num_batches' in key}
    # BatchNorm in a checkpointed stage sees each batch a second time when the backward pass repeats the forward pass.
    assert steps['stem.0.bn.num_batches_tracked'] == 10 and steps['stages.1.1.g.bn.num_batches_tracked'] == 20


def averaged(folder, plain):
    saved = checkpoint(folder)
    same_loss(1e-6)(folder, plain)
    assert not torch.equal(saved['state_dict_ema']['head.weight'], saved['state_dict']['head.weight'])


def stem_of_one_channel(folder, plain):
    assert checkpoint(folder)['state_dict']['stem.0.conv.weight'].shape[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize('name, flags, check', [
    ('bf16', ['--amp', '--amp-dtype', 'bfloat16'], half_precision),
    ('channels-last', ['--channels-last'], same_loss(1e-3)),
    ('compile', ['--torchcompile', 'aot_eager'], same_loss(1e-3)),  # inductor is what the fast variant has
    ('torchscript', ['--torchscript'], same_loss(1e-3)),
    ('checkpointing', ['--grad-checkpointing'], recomputed),
    ('ema', ['--model-ema', '--model-ema-decay', '0.9'], averaged),
    ('sync-bn', ['--sync-bn'], same_loss(1e-6)),  # one process; between processes torch has it for GPUs alone
    ('drop-path', ['--drop-path', '0.5'], other_loss),
    ('grey', ['--in-chans', '1', '--mean', '0.44', '--std', '0.24'], stem_of_one_channel),
    ('size', ['--img-size', '64'], other_loss),
])
def test_flag(train, plain, name, flags, check):
    check(train(name, *TINY, *ONE_EPOCH, *flags), plain)


@pytest.mark.slow
def test_initial_checkpoint_in_the_authors_layout(work, train):
    """After an epoch at a learning rate of zero, the parameters are those of the file."""
    weights = timm.create_model('gmnet_s1', num_classes=len(CLASSES)).state_dict()
    torch.save({'state_dict': weights, 'epoch': 310}, work / 'authors.pth')
    still = ['--epochs', '2', '--warmup-epochs', '2', '--warmup-lr', '0', '--lr', '1e-30', '--min-lr', '0']
    folder = train(
        'initial', '--model', 'gmnet_s1', *still, '--cooldown-epochs', '0', '--initial-checkpoint', 'authors.pth')
    trained = checkpoint(folder)['state_dict']
    parameters = [key for key in weights if 'running' not in key and 'num_batches' not in key]
    assert all(torch.allclose(trained[key], weights[key], rtol=0, atol=1e-12) for key in parameters)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_distillation_from_another_timm_model(work, train, plain, kind):
    teacher = timm.create_model('resnet10t', num_classes=len(CLASSES))
    save_for_hf(teacher, work / 'teacher')
    flags = ['--kd-model-name', f'local-dir:{work / "teacher"}', '--kd-distill-type', kind]
    student = train(f'student-{kind}', *TINY, *ONE_EPOCH, *flags)
    # The teacher's term comes on top of the loss of the labels.
    assert summary(student)[0]['train_loss'] > summary(plain)[0]['train_loss'] + .01


@pytest.mark.slow
def test_torchrun_trains_on_two_processes(train):
    folder = train('two', *TINY, *ONE_EPOCH, processes=2)
    assert checkpoint(folder)['args'].world_size == 2
    run = read_run(folder)
    assert run.world_size == 2 and len(run.epochs) == 1
    steps = next(iter(checkpoint(folder)['optimizer']['state'].values()))['step']
    assert steps == 40 * len(CLASSES) // (2 * 32)  # each process sees half of the images


@pytest.mark.slow
def test_accumulation_and_two_processes_take_the_same_steps(work, train):
    """A step sees all four images of the folder, so that their order does not matter, and GroupNorm (instead of
    BatchNorm) each image for itself, so that neither does how they are spread: the losses must agree."""
    for split in ('train', 'validation'):
        for name in CLASSES[:4]:
            folder = work / 'four' / split / name
            folder.mkdir(parents=True)
            shutil.copy(sorted((work / 'data' / split / name).iterdir())[0], folder / 'image.png')
    flags = [
        *TINY, 'norm_layer=groupnorm1', *PLAIN, '--data-dir', 'four', '--num-classes', '4', '--batch-size', '2',
        '--epochs', '4', '--warmup-epochs', '0', '--cooldown-epochs', '0', '--opt', 'sgd', '--lr', '0.02']

    def losses(name, *more, processes=1):
        return [row['train_loss'] for row in summary(train(name, *flags, *more, processes=processes))]

    accumulated = losses('accumulated', '--grad-accum-steps', '2')
    assert losses('spread', processes=2) == pytest.approx(accumulated, rel=1e-5)
    assert losses('single') != pytest.approx(accumulated, rel=1e-3)  # twice the steps: the comparison can fail
    assert accumulated[3] != pytest.approx(accumulated[0], rel=1e-2)


@pytest.mark.slow
def test_killed_run_is_continued(work, train):
    """SIGKILL in the middle of epoch 2 of 4, then --resume in the same folder."""
    flags = [*TINY, *PLAIN, '--epochs', '4', '--warmup-epochs', '1', '--cooldown-epochs', '0', '--log-interval', '1']
    whole = train('whole', *flags)
    command = [sys.executable, '-u', 'train.py', *train_args('killed'), *flags]
    process = subprocess.Popen(
        command, cwd=work, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if 'Train: 2 [   3/' in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    killed = work / 'runs' / 'killed'
    assert [e.epoch for e in read_run(killed).epochs] == [0, 1] and checkpoint(killed)['epoch'] == 1

    train('killed', *flags, '--resume', 'runs/killed/last.pth.tar')
    epochs, expected = read_run(killed).epochs, read_run(whole).epochs
    assert [(e.epoch, e.values['lr']) for e in epochs] == [(e.epoch, e.values['lr']) for e in expected]
    assert epochs[1].train_loss == expected[1].train_loss  # the part before the kill is the same run
    state, expected_state = checkpoint(killed)['optimizer'], checkpoint(whole)['optimizer']
    assert state['param_groups'] == expected_state['param_groups']
    assert [s['step'] for s in state['state'].values()] == [s['step'] for s in expected_state['state'].values()]
    # The order of the images after the kill is another one: train.py does not save the random state.
    assert epochs[-1].train_loss == pytest.approx(expected[-1].train_loss, rel=.1)
    assert epochs[-1].top1 == pytest.approx(expected[-1].top1, abs=15)


@pytest.mark.slow
@pytest.mark.parametrize('flags', [(), ('--reparam',)])
def test_validate_repeats_the_top1_of_the_training(run, trained, flags):
    best = max(row['eval_top1'] for row in summary(trained))
    out = run('validate.py', *MODEL, '--data-dir', 'data', '--checkpoint', trained / 'model_best.pth.tar',
              '-b', '32', '-j', '0', *flags)
    assert json.loads(out.split('--result\n')[1])['top1'] == pytest.approx(best, abs=1e-3)


@pytest.mark.slow
def test_inference_names_each_image(work, run, trained):
    pytest.importorskip('pandas', reason='inference.py needs pandas')
    run('inference.py', *MODEL, '--data-dir', 'data/validation', '--checkpoint', trained / 'model_best.pth.tar',
        '-b', '32', '-j', '0', '--results-dir', 'inference', '--include-index', '--fullname', '--topk', '1')
    with next((work / 'inference').glob('*.csv')).open() as f:
        rows = list(csv.DictReader(f))
    right = [CLASSES[int(row['index'])] == Path(row['filename']).parent.name for row in rows]
    assert len(rows) == len(list((work / 'data' / 'validation').glob('*/*.png')))
    assert 100 * sum(right) / len(rows) == pytest.approx(max(row['eval_top1'] for row in summary(trained)), abs=1e-3)


@pytest.mark.slow
def test_benchmark_counts_the_model(run):
    out = run('benchmark.py', '--model', 'gmnet_s1', '--img-size', '32', '-b', '2', '--device', 'cpu', '--no-retry',
              '--num-warm-iter', '1', '--num-bench-iter', '5')
    result = json.loads(out.split('--result\n')[1])
    assert result['param_count'] == pytest.approx(3.66, abs=.005)
    assert result['infer_samples_per_sec'] > 0 and result['train_samples_per_sec'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('flags', [(), ('--dynamo',), ('--dynamic-size',), ('--dynamo', '--reparam')])
def test_exported_onnx_computes_the_same(work, run, trained, flags):
    pytest.importorskip('onnx', reason='onnx_export.py needs onnx')
    pytest.importorskip('onnxscript', reason='onnx_export.py needs onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    best = trained / 'model_best.pth.tar'
    run('onnx_export.py', 'model.onnx', '--model', 'gmnet_s1', '--num-classes', len(CLASSES), '--img-size', '32',
        '--checkpoint', best, *flags)
    model = timm.create_model('gmnet_s1', num_classes=len(CLASSES), checkpoint_path=str(best)).eval()
    image = torch.randn(1, 3, 32, 32)
    session = onnxruntime.InferenceSession(work / 'model.onnx')
    logits = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), model(image).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_avg_and_clean_checkpoint(work, run, trained):
    best = load_state_dict(str(trained / 'model_best.pth.tar'))
    run('clean_checkpoint.py', '--checkpoint', trained / 'model_best.pth.tar', '--output', 'clean.safetensors',
        '--safetensors')
    cleaned = load_state_dict(str(next(work.glob('clean*.safetensors'))))
    assert cleaned.keys() == best.keys() and all(torch.equal(cleaned[key], best[key]) for key in best)

    run('avg_checkpoints.py', '--input', trained, '--filter', 'checkpoint-*.pth.tar', '--output', 'average.safetensors',
        '--safetensors', '-n', '3')
    averaged = load_state_dict(str(work / 'average.safetensors'))
    files = sorted(trained.glob('checkpoint-*.pth.tar'))
    assert len(files) == 3
    mean = sum(load_state_dict(str(path))['head.weight'].double() for path in files) / 3
    torch.testing.assert_close(averaged['head.weight'].double(), mean)


@pytest.mark.slow
def test_device_modules_in_place_of_the_autoload(train, monkeypatch):
    monkeypatch.setenv('GMNET_TIMM_AUTOLOAD', '0')
    folder = train('device-modules', *TINY, *ONE_EPOCH, '--device-modules', 'gmnet_timm')
    assert summary(folder)[0]['train_loss'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('gate', ['fc', 'dw', 'ln'])
def test_ablations_of_the_paper(gate, train):
    folder = train(f'gate-{gate}', *TINY, f'gate={gate}', 'act_layer=gelu', *ONE_EPOCH)
    architecture = infer_architecture(load_state_dict(str(folder / 'last.pth.tar')))
    assert architecture.gate == gate and summary(folder)[0]['train_loss'] > 0


@pytest.mark.slow
def test_subjects_of_the_paper(train):
    folder = train('subject', '--model', 'resnet18_gate_relu6', *ONE_EPOCH)
    assert summary(folder)[0]['train_loss'] > 0
