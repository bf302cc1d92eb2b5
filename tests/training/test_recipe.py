"""Recipes: the numbers that were published, and the arithmetic that keeps them on other GPUs."""
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from timm.scheduler import create_scheduler_v2

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.training.recipe import (
    RECIPES,
    compose_recipe,
    launch_commands,
    load_recipe,
    plan_finetuning,
    plan_layout,
    slurm_script,
)

# Typed from the paper's description, not from the YAML file.
PUBLISHED = dict(
    opt='adamw', sched='cosine', epochs=300, lr=.003, weight_decay=.05, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5,
    cooldown_epochs=10, aa='rand-m1-mstd0.5-inc1', mixup=.8, cutmix=.2, mixup_switch_prob=.5, smoothing=.1, reprob=.25,
    remode='pixel', color_jitter=0, drop_path=0, train_interpolation='random', seed=42, img_size=224,
    interpolation='bicubic', crop_pct=.875, mean=[.485, .456, .406], std=[.229, .224, .225], num_classes=1000,
    pretrained=False, model_ema=False, kd_model_name=None, amp=False,
)


def test_imagenet_recipe_is_the_published_one():
    recipe = load_recipe('imagenet')
    assert {key: recipe[key] for key in PUBLISHED} == PUBLISHED
    assert 8 * recipe['batch_size'] * recipe['grad_accum_steps'] == 2048


def test_fast_variant_differs_in_its_three_values_and_says_that_it_is_ours():
    base, fast = load_recipe('imagenet'), load_recipe('imagenet-fast')
    assert fast == {**base, 'amp': True, 'channels_last': True, 'torchcompile': 'inductor'}
    assert fast['amp_dtype'] == 'bfloat16'
    header = compose_recipe('gmnet_s1', plan_layout(8, 256), 'imagenet-fast').split('\n\n')[0]
    assert 'OUR variant' in header and 'UNPROVEN' in header


def test_interpretations_are_marked_beside_the_value():
    text = compose_recipe('gmnet_s3', plan_layout(8, 256))
    for key in ('sched_on_updates', 'cooldown_epochs', 'warmup_prefix', 'amp'):
        assert re.search(rf'^{key}: .*# interpretation', text, re.MULTILINE), key


def test_schedule_is_stepped_per_epoch_with_warmup_inside_and_cooldown_after():
    """The learning rate of each of the 310 epochs, from the recipe through timm and from the formula."""
    recipe = load_recipe('imagenet')
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe['lr'])
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched=recipe['sched'], num_epochs=recipe['epochs'], warmup_epochs=recipe['warmup_epochs'],
        warmup_lr=recipe['warmup_lr'], min_lr=recipe['min_lr'], cooldown_epochs=recipe['cooldown_epochs'],
        warmup_prefix=recipe['warmup_prefix'], step_on_epochs=not recipe['sched_on_updates'])
    seen = []
    for epoch in range(epochs):
        seen.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    warmup = [1e-6 + (3e-3 - 1e-6) * i / 5 for i in range(5)]
    cosine = [1e-5 + (3e-3 - 1e-5) * (1 + math.cos(math.pi * i / 300)) / 2 for i in range(5, 300)]
    assert seen == pytest.approx(warmup + cosine + [1e-5] * 10)


@pytest.mark.parametrize('gpus', [1, 2, 3, 6, 8, 16, 64])
@pytest.mark.parametrize('batch_size', [1, 32, 48, 100, 128, 256, 2048, 4096])
def test_layout_reaches_the_global_batch_size_exactly_or_proposes_what_does(gpus, batch_size):
    possible = [n for n in range(1, 2049) if gpus * batch_size * n == 2048]
    if possible:
        assert plan_layout(gpus, batch_size).grad_accum_steps == possible[0]
        return
    with pytest.raises(UserError) as e:
        plan_layout(gpus, batch_size)
    proposals = re.findall(r'--gpus (\d+) --batch-size (\d+) \(--grad-accum-steps (\d+)\)', str(e.value))
    assert proposals
    assert {int(g) * int(b) * int(a) for g, b, a in proposals} == {2048}
    if 2048 % gpus == 0:
        assert {int(g) for g, _, _ in proposals} == {gpus}
        fitting = [b for b in range(1, 2049) if 2048 % (gpus * b) == 0]
        nearest = min(abs(b - batch_size) for b in fitting)
        assert abs(int(proposals[0][1]) - batch_size) == nearest


def test_layout_takes_only_the_right_gradient_accumulation_and_even_nodes():
    assert plan_layout(2, 256, grad_accum_steps=4).global_batch_size == 2048
    with pytest.raises(UserError, match=r'= global batch size 1536, not 2048.*--grad-accum-steps 4'):
        plan_layout(2, 256, grad_accum_steps=3)
    with pytest.raises(UserError, match='spread evenly'):
        plan_layout(8, 256, nodes=3)
    for gpus in (0, 10 ** 12):  # of the latter, looking for divisors would take for ever
        with pytest.raises(UserError, match='whole numbers from 1 to 1,000,000'):
            plan_layout(gpus, 256, scale_lr=True)


def test_scale_lr_keeps_the_learning_rate_per_image():
    layout = plan_layout(3, 100, scale_lr=True, grad_accum_steps=2)
    scaled, base = yaml.safe_load(compose_recipe('gmnet_s1', layout)), load_recipe('imagenet')
    for key in ('lr', 'warmup_lr', 'min_lr'):
        assert scaled[key] / 600 == pytest.approx(base[key] / 2048, rel=1e-5), key
        assert isinstance(scaled[key], float)  # 1e-6 without a point would be read as a string


def test_composed_recipe_changes_nothing_else_and_keeps_the_comments():
    text = compose_recipe('gmnet_s4', plan_layout(2, 256))
    assert yaml.safe_load(text) == {
        **load_recipe('imagenet'), 'model': 'gmnet_s4', 'batch_size': 256, 'grad_accum_steps': 4}
    assert text.count('# interpretation') == 5
    assert text.splitlines()[0] == (
        '# gmnet_s4, recipe imagenet: '
        'world size 2 x batch size 256 x 4 gradient accumulation steps = global batch size 2048.')
    with pytest.raises(UserError, match='does not set momentun'):
        compose_recipe('gmnet_s4', plan_layout(2, 256), momentun=1)


@pytest.mark.parametrize('value', ['a: b # c.pth', "it's.pth", '1e5', 'null', '\\1'])
def test_composed_values_survive_yaml(value):
    text = compose_recipe('gmnet_s1', plan_layout(1, 256, total=256), 'finetune', pretrained_path=value)
    assert yaml.safe_load(text)['pretrained_path'] == value


@pytest.mark.parametrize('gpus, nodes', [(1, 1), (2, 1), (8, 2), (64, 8), (6, 1)])
def test_every_command_line_has_the_global_batch_size(gpus, nodes):
    layout = plan_layout(gpus, 16, nodes=nodes, scale_lr=True, grad_accum_steps=3)
    commands = launch_commands(layout, 'my recipe.yaml', 'run', '/data/my images')
    assert len(commands) == (1 if gpus == 1 else 3)
    for command in commands.values():
        argv = shlex.split(command)
        number = {flag: int(value) for flag, value in re.findall(r'--(nnodes|nproc_per_node)=(\d+)', command)}
        processes = number.get('nnodes', 1) * number.get('nproc_per_node', 1)
        flag = '--grad-accum-steps'
        steps = argv[argv.index(flag) + 1] if flag in argv else layout.grad_accum_steps
        assert processes * 16 * int(steps) == layout.global_batch_size
        assert argv[argv.index('-c') + 1] == 'my recipe.yaml'
        assert argv[argv.index('--data-dir') + 1] == '/data/my images'


def test_slurm_script_runs_and_resumes(tmp_path):
    """The script itself, in bash, with stand-ins for Slurm's programs and torchrun."""
    many_nodes = 'echo n1; for i in {2..99999}; do echo n$i; done'
    for name, body in dict(srun='exec "$@"', scontrol=many_nodes, torchrun='printf "%s\\n" "$@"').items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'job.sh').write_text(slurm_script(plan_layout(16, 128, nodes=2), 's 3.yaml', 'gmnet_s3'))
    env = dict(
        os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_JOB_NODELIST='n[1-2]', SLURM_JOB_ID='7',
        TIMM_SCRIPTS='/timm', IMAGENET='/data/image net')

    def run():
        done = subprocess.run(['bash', 'job.sh'], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    argv = run()
    assert argv[:5] == [
        '--nnodes=2', '--nproc_per_node=8', '--rdzv_id=7', '--rdzv_backend=c10d', '--rdzv_endpoint=n1:29500']
    assert argv[5:9] == ['/timm/train.py', '-c', 's 3.yaml', '--data-dir']
    assert argv[9:] == ['/data/image net', '--output', 'runs', '--experiment', 'gmnet_s3']
    (tmp_path / 'runs' / 'gmnet_s3').mkdir(parents=True)
    (tmp_path / 'runs' / 'gmnet_s3' / 'last.pth.tar').touch()
    assert run() == [*argv, '--resume', 'runs/gmnet_s3/last.pth.tar']


def test_slurm_script_asks_for_a_time_and_says_what_else_a_cluster_may_want():
    lines = slurm_script(plan_layout(8, 256), 's3.yaml', 'gmnet_s3').splitlines()
    directives = [line for line in lines if line.startswith('#SBATCH ')]
    assert '#SBATCH --time=24:00:00' in directives and all(line.count(' ') == 1 for line in directives)
    assert lines.index('##SBATCH --partition=PARTITION') < lines.index('set -euo pipefail')  # sbatch reads no further
    assert '##SBATCH --account=ACCOUNT' in lines


def test_recipe_of_another_model_is_not_called_its_published_one(capsys):
    assert main(['recipe', 'resnet18']) == 0
    header = capsys.readouterr().out.split('\nmodel:')[0]
    assert 'GmNet on ImageNet-1k, as published' not in header and 'GmNet on ImageNet-1k from scratch' not in header
    assert 'The recipe is made for GmNet, resnet18 is not one.' in header
    assert main(['recipe', 'gmnet_s2']) == 0
    assert 'is not one' not in capsys.readouterr().out


def test_command_prints_one_yaml_file_with_the_commands_in_it(capsys):
    assert main(['recipe', 'gmnet_s3', '--gpus', '2', '--batch-size', '256']) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out) == {**load_recipe('imagenet'), 'grad_accum_steps': 4}
    assert '\n# torchrun --standalone --nproc_per_node=2 "$TIMM_SCRIPTS/train.py" -c recipe.yaml' in out


def test_command_writes_the_file_and_prints_what_runs_it(tmp_path, capsys):
    path = tmp_path / 's1.yaml'
    argv = ['recipe', 'gmnet_s1', '--gpus', '16', '--nodes', '2', '--batch-size', '128', '-o', str(path)]
    assert main([*argv, '--slurm']) == 0
    assert capsys.readouterr().out.startswith('#!/bin/bash\n')
    assert yaml.safe_load(path.read_text())['model'] == 'gmnet_s1'
    assert main(argv) == 1
    assert '--force' in capsys.readouterr().err
    assert main([*argv, '--force']) == 0
    assert '--nnodes=2 --nproc_per_node=8' in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    (['gmnet_s5'], 'gmnet_s4 or gmnet_s3 or gmnet_s2 or gmnet_s1'),
    (['vit_tinny'], 'Did you mean vit_tiny_patch16_224'),
    (['resnt18'], 'Did you mean resnet18'),
    (['zzzz'], 'gmnet_s1, gmnet_s2, gmnet_s3, gmnet_s4'),
    ([], 'Which model'),
    (['gmnet_s1', '--gpus', '3'], 'not 2048'),
    (['gmnet_s1', '--recipe', 'cifar'], 'Recipes: imagenet, imagenet-fast, finetune'),
    (['gmnet_s1', '--slurm', '--gpus', '8'], '-o FILE'),
    (['gmnet_s1', '--pretrained-path', 'a.pth'], 'from scratch'),
    (['gmnet_s1', '--img-size', '64'], 'from scratch'),
    (['gmnet_s1', '--recipe', 'finetune', '--pretrained-path', 'a.pth'], '--num-classes'),
    (['gmnet_s1', '--recipe', 'finetune', '--num-classes', '3'], '--pretrained-path'),
    (['gmnet_s1', '--recipe', 'finetune', '--pretrained-path', 'a.pth', '--data-dir', 'nowhere'], 'train/CLASS'),
    (['gmnet_s4', '--recipe', 'finetune', '--pretrained-path', 'a.pth', '--num-classes', '3', '--memory', '1'],
     '--img-size'),
])
def test_command_refuses_with_what_to_do(argv, message, capsys):
    assert main(['recipe', *argv]) == 1
    assert message in capsys.readouterr().err


def test_finetune_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': timm.create_model('gmnet_s1').state_dict(), 'args': {'model': 'gmnet_s1'}}, 'a.pth')
    argv = ['recipe', 'gmnet_s1', '--recipe', 'finetune', '--num-classes', '3', '--pretrained-path', 'a.pth']
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert 'IMAGENET' not in out and '--data-dir "$DATA_DIR"' in out and '# DATA_DIR: your images' in out
    recipe = yaml.safe_load(out)
    published = load_recipe('finetune')
    scaled = {key: published[key] * 64 / RECIPES['finetune'] for key in ('lr', 'warmup_lr', 'min_lr')}
    assert recipe == {**published, **scaled, 'model': 'gmnet_s1', 'num_classes': 3, 'pretrained_path': 'a.pth',
                      'batch_size': 64}  # half of 8 GB over 48 MiB per image is 79
    assert recipe['pretrained'] and 0 < recipe['layer_decay'] < 1


def test_finetuning_follows_from_the_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': timm.create_model('gmnet_s1').state_dict(), 'args': {'model': 'gmnet_s1'}}, 'a.pth')
    for name in ('cat', 'dog'):
        folder = tmp_path / 'my images' / 'train' / name
        folder.mkdir(parents=True)
        for i in range(170):
            (folder / f'{i}.png').touch()
    argv = ['recipe', 'gmnet_s1', '--recipe', 'finetune', '--pretrained-path', 'a.pth', '--data-dir', 'my images']
    assert main([*argv, '--memory', '4', '--img-size', '96']) == 0
    out = capsys.readouterr().out
    assert "--data-dir 'my images'" in out and 'DATA_DIR' not in out
    recipe = yaml.safe_load(out)
    assert (recipe['num_classes'], recipe['img_size']) == (2, 96)
    assert recipe['batch_size'] == 16  # 340 images in at least 20 updates per epoch
    assert recipe['epochs'] == 48 and recipe['warmup_epochs'] == 4  # of 21 updates
    assert recipe['lr'] == 16 / 256 * 5e-4
    assert main([*argv, '--num-classes', '3']) == 1
    assert '2 classes, and --num-classes says 3' in capsys.readouterr().err


@pytest.mark.parametrize('memory, images, size, expected', [
    (8, None, 224, dict(batch_size=64)),
    (80, None, 224, dict(batch_size=256)),
    (8, 1_000_000, 224, dict(batch_size=64, epochs=5, warmup_epochs=1)),
    (8, 960, 224, dict(batch_size=32, epochs=33, warmup_epochs=3)),
    (1, 960, 224, dict(batch_size=8, epochs=8, warmup_epochs=1)),
    (8, 30, 224, dict(batch_size=8, epochs=100, warmup_epochs=10)),
    (1, 960, 64, dict(batch_size=32, epochs=33, warmup_epochs=3)),
])
def test_finetuning_plans(memory, images, size, expected):
    assert plan_finetuning('gmnet_s1', memory, images, size) == expected
    with pytest.raises(UserError, match='--img-size'):
        plan_finetuning('gmnet_s4', 1, images, 224)


def test_finetune_keeps_the_network_that_the_weights_were_trained_in(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kwargs = dict(act_layer='gelu', gate='dw', output_stride=16)
    torch.save({'state_dict': timm.create_model('gmnet_s1', **kwargs).state_dict(), 'args': {
        'model': 'gmnet_s1', 'gp': 'max', 'model_kwargs': kwargs}}, 'a.pth')
    argv = ['recipe', 'gmnet_s1', '--recipe', 'finetune', '--num-classes', '3', '--pretrained-path', 'a.pth']
    assert main(argv) == 0
    recipe = yaml.safe_load(capsys.readouterr().out)
    assert (recipe['gp'], recipe['model_kwargs']) == ('max', kwargs)
    assert main([*argv[:1], 'gmnet_s3', *argv[2:]]) == 1
    assert 'holds a gmnet_s1, not a gmnet_s3' in capsys.readouterr().err
    assert main([*argv[:-1], 'nowhere.pth']) == 1
    assert 'No checkpoint at nowhere.pth' in capsys.readouterr().err


def test_finetune_starts_from_what_train_py_can_read(capsys, tmp_path, monkeypatch):
    """timm would load other names without strictness, which leaves random weights, or not know the format."""
    monkeypatch.chdir(tmp_path)
    weights = timm.create_model('gmnet_s1').state_dict()
    torch.save({'module.' + key: value for key, value in weights.items()}, 'ddp.pth')
    torch.save({'state_dict': {'model.' + key: value for key, value in weights.items()}}, 'lightning.ckpt')
    np.savez('a.npz', **{key: value.numpy() for key, value in weights.items()})
    argv = ['recipe', 'gmnet_s1', '--recipe', 'finetune', '--num-classes', '3', '--pretrained-path']
    assert main([*argv, 'ddp.pth']) == 0
    for name in ('lightning.ckpt', 'a.npz'):
        assert main([*argv, name]) == 1
        assert f'`gmnet-timm convert {name} weights.safetensors`' in capsys.readouterr().err
        assert main(['convert', name, 'weights.safetensors', '--force']) == 0
        assert main([*argv, 'weights.safetensors']) == 0
    model = timm.create_model(  # as train.py does
        'gmnet_s1', pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(file='weights.safetensors'))
    assert torch.equal(model.state_dict()['stem.0.conv.weight'], weights['stem.0.conv.weight'])


def test_recipes_are_read_without_torch_and_timm():
    """The package itself stands in as an empty one: what it imports is not the subject."""
    code = (
        'import sys, types\n'
        'package = types.ModuleType("gmnet_timm"); package.__path__ = [sys.argv[1]]\n'
        'sys.modules["gmnet_timm"] = package\n'
        'import gmnet_timm.training.recipe, gmnet_timm.weights.runs, gmnet_timm.training.check\n'
        'import gmnet_timm.cli.training\n'
        'gmnet_timm.training.recipe.load_recipe("imagenet")\n'
        'assert not {"torch", "timm"} & sys.modules.keys()\n'
    )
    package = Path(compose_recipe.__globals__['__file__']).parents[1]
    subprocess.run([sys.executable, '-c', code, str(package)], check=True)
