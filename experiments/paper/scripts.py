"""The figures and tables of the paper's frequency analysis, each as a shell script that trains, evaluates and draws.

The script trains one model after the other by timm's train.py. Run again, it resumes each training after its last
finished epoch, and then evaluates what is not evaluated yet.
"""
import dataclasses
import shlex

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
    """

    title: str
    recipe: str
    models: dict[str, tuple[str, str]]
    command: str
    radii: str
    checkpoint: str = ''


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
    'resnet18': _curves('resnet18'),
    'mobilenetv2': _curves('mobilenetv2_100'),
    'activations': _grid(
        'GmNet-S3 by the activation of its gates', 'act_layer', ('identity', 'relu', 'gelu', 'relu6'), 'relu6',
        '12 24 36'),
    'gates': _grid('GmNet-S3 by gate', 'gate', ('ln', 'dw', 'fc', 'identity'), 'identity', '12'),
}


def figure_script(name: str, layout: Layout, data_dir: str | None = None, train_flags: str = '') -> str:
    """A bash script that makes a figure.

    Args:
        name: A key of `FIGURES`.
        layout: From `plan_layout`.
        data_dir: Folder of ImageNet; if None, the variable `$IMAGENET`. `$TIMM_SCRIPTS` is the checkout with train.py.
        train_flags: Further flags of train.py for each training, as typed in a shell.

    Raises:
        UserError: There is no such figure.
    """
    if name not in FIGURES:
        raise UserError(f'There is no figure {name}. Figures: {", ".join(FIGURES)}.')
    figure = FIGURES[name]
    trainings = '\n'.join(
        _training(run, *model, figure.recipe, layout, data_dir, train_flags) for run, model in figure.models.items())
    runs = ' '.join(f'runs/{run}{figure.checkpoint}' for run in figure.models)
    data = '"$IMAGENET"' if data_dir is None else shlex.quote(data_dir)
    again = ' --force' if figure.command == 'freq eval' else ''
    return f'''#!/bin/bash
# {figure.title}
# recipe {figure.recipe}, {layout}
set -euo pipefail
mkdir -p runs

{trainings}
gmnet-timm {figure.command} {runs} --data-dir {data} --radii {figure.radii} --output figures/{name}{again}
'''


def _training(
        run: str,
        model: str,
        model_flags: str,
        recipe: str,
        layout: Layout,
        data_dir: str | None,
        train_flags: str,
) -> str:
    config = f'runs/{run}.yaml'
    commands = launch_commands(layout, config, run, data_dir, recipe)
    command = commands.get('one node', commands['one process'])
    flags = ''.join(f'{part} ' for part in (model_flags, train_flags) if part)
    return f'''gmnet-timm recipe {model} --recipe {recipe} --gpus {layout.world_size} \\
    --batch-size {layout.batch_size} -o {config} --force > runs/{run}.txt
resume=()
if [ -e runs/{run}/last.pth.tar ]; then resume=(--resume runs/{run}/last.pth.tar); fi
{command} \\
    {flags}"${{resume[@]}}"
'''
