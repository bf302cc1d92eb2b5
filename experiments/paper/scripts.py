"""The figures and tables of the paper's frequency analysis, each as a shell script that trains, evaluates and draws.

The script trains one model after the other by timm's train.py. Run again, it resumes each training after its last
finished epoch, and then evaluates what is not evaluated yet.
"""
import dataclasses
import shlex
from collections.abc import Sequence

from gmnet_timm.errors import UserError
from gmnet_timm.training.recipe import Layout, launch_commands, run_name

__all__ = ['FIGURES', 'Figure', 'figure_script']


@dataclasses.dataclass(frozen=True)
class Figure:
    """What one figure or table of the paper is made of.

    Attributes:
        title: What it shows.
        recipe: Recipe of the trainings.
        models: Name of the run to model and its arguments.
        command: The command that evaluates and draws.
        radii: In cycles per image, the paper's.
        checkpoint: File of a run that the command takes, '' for the folder.
        others: Models with published weights, which are evaluated beside.
    """

    title: str
    recipe: str
    models: dict[str, tuple[str, str]]
    command: str
    radii: str
    checkpoint: str = ''
    others: tuple[str, ...] = ()


def _curves(body: str) -> Figure:
    models = [body, f'{body}_ewp', f'{body}_gate_relu6', f'{body}_gate_gelu']
    return Figure(
        f'learning curves by frequency of {body} and its gates', 'frequency',
        {run_name(model, 'frequency'): (model, '') for model in models}, 'freq curves', '10')


def _grid(title: str, argument: str, values: tuple[str, ...], default: str, radii: str) -> Figure:
    models = {
        'gmnet_s3' if value == default else f'gmnet_s3-{argument}-{value}':
        ('gmnet_s3', '' if value == default else f'--model-kwargs {argument}={value}') for value in values}
    return Figure(title, 'imagenet', models, 'freq eval', radii, '/last.pth.tar')


FIGURES = {
    'figure1': Figure(
        'a picture, its low-pass and its high-pass image, and what ResNet18 says of them', '', {}, 'freq image', '12',
        others=('resnet18.a1_in1k',)),
    'resnet18': _curves('resnet18'),
    'mobilenetv2': _curves('mobilenetv2_100'),
    'activations': _grid(
        'GmNet-S3 by the activation of its gates', 'act_layer', ('identity', 'relu', 'gelu', 'relu6'), 'relu6',
        '12 24 36'),
    'gates': _grid('GmNet-S3 by gate', 'gate', ('ln', 'dw', 'fc', 'identity'), 'identity', '12'),
    'bands': Figure(
        'GmNet-S3 beside StarNet-S4 and MobileOne-S2 by band; EfficientMod is not in timm', 'imagenet',
        {'gmnet_s3': ('gmnet_s3', '')}, 'freq eval', '12 24 36', '/last.pth.tar',
        ('starnet_s4.in1k', 'mobileone_s2.apple_in1k')),
}


def figure_script(
        name: str,
        layout: Layout,
        data_dir: str | None = None,
        train_flags: str = '',
        seeds: Sequence[int] = (),
        radii: Sequence[float] = (),
) -> str:
    """A bash script that makes a figure.

    Args:
        name: A key of `FIGURES`.
        layout: From `plan_layout`.
        data_dir: Folder of ImageNet; if None, the variable `$IMAGENET`. `$TIMM_SCRIPTS` is the checkout with train.py,
            `$PICTURE` the picture of figure1.
        train_flags: Further flags of train.py for each training, as typed in a shell.
        seeds: Several trainings of each model, whose mean and interval are drawn; by default one with the recipe's.
        radii: In cycles per image, by default the paper's.

    Raises:
        UserError: There is no such figure.
    """
    if name not in FIGURES:
        raise UserError(f'There is no figure {name}. Figures: {", ".join(FIGURES)}.')
    figure = FIGURES[name]
    trainings, paths, groups = [], [], []
    further = shlex.join(shlex.split(train_flags))
    for run, (model, model_flags) in figure.models.items():
        for suffix, seed in [(f'-seed{seed}', f'--seed {seed}') for seed in seeds] or [('', '')]:
            flags = ' '.join(filter(None, [model_flags, seed, further]))
            trainings.append(_training(run + suffix, model, flags, figure.recipe, layout, data_dir))
            paths.append(f'runs/{run}{suffix}{figure.checkpoint}')
            groups.append(run)
    data = '"$IMAGENET"' if data_dir is None else shlex.quote(data_dir)
    radius_words = ' '.join(f'{radius:g}' for radius in radii) or figure.radii
    if figure.command == 'freq image':
        last = f'"$PICTURE" --model {figure.others[0]} --radii {radius_words} --output figures/{name} --force'
    else:
        words = ' '.join([*paths, *figure.others])
        grouped = f' --groups {" ".join([*groups, *figure.others])}' if len(seeds) > 1 else ''
        again = ' --force' if figure.command == 'freq eval' else ''
        last = f'{words} --data-dir {data} --radii {radius_words}{grouped} --output figures/{name}{again}'
    head = f'# {figure.title}\n' + (f'# recipe {figure.recipe}, {layout}\n' if trainings else '')
    body = '\n'.join(trainings)
    return f'''#!/bin/bash
{head}set -euo pipefail
mkdir -p runs

{body}
gmnet-timm {figure.command} {last}
'''


def _training(run: str, model: str, flags: str, recipe: str, layout: Layout, data_dir: str | None) -> str:
    config = f'runs/{run}.yaml'
    commands = launch_commands(layout, config, run, data_dir, recipe)
    command = commands.get('one node', commands['one process'])
    return f'''gmnet-timm recipe {model} --recipe {recipe} --gpus {layout.world_size} \\
    --batch-size {layout.batch_size} -o {config} --force > runs/{run}.txt
resume=()
if [ -e runs/{run}/last.pth.tar ]; then resume=(--resume runs/{run}/last.pth.tar); fi
{command} \\
    {flags + " " if flags else ""}"${{resume[@]}}"
'''
