"""Recipes for timm's train.py, fitted to the GPUs at hand.

A recipe is a YAML file for `train.py -c`. What stays fixed when the number of GPUs changes is the number of images a
step: GPUs x batch size x accumulation. The published one is 2048.
"""
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml

from gmnet_timm.errors import UserError

__all__ = [
    'RECIPES', 'Layout', 'RecipeError', 'compose_recipe', 'images_a_step', 'launch_commands', 'load_recipe',
    'plan_layout', 'run_name', 'slurm_script',
]

# recipe -> images a step that its learning rates are for
RECIPES = {'imagenet': 2048, 'imagenet-fast': 2048, 'finetune': 256}

_LEARNING_RATES = ('lr', 'warmup_lr', 'min_lr')  # scaled alike, so that the schedule keeps its form


class RecipeError(UserError, ValueError):
    """A recipe that cannot be had as asked."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the images of one optimizer step are spread."""

    gpus: int  # over all nodes, one process each
    batch_size: int  # a process
    accumulation: int = 1
    nodes: int = 1

    @property
    def total(self) -> int:
        """Images a step."""
        return self.gpus * self.batch_size * self.accumulation

    def __str__(self) -> str:
        return (
            f'{_count(self.gpus, "GPU")} x batch {self.batch_size} x accumulation {self.accumulation} = '
            f'{self.total} images a step'
        )


def plan_layout(
        gpus: int,
        batch_size: int,
        *,
        total: int = RECIPES['imagenet'],
        accumulation: Optional[int] = None,
        nodes: int = 1,
        scale_lr: bool = False,
) -> Layout:
    """Find the accumulation that makes a number of GPUs and a batch size add up to a recipe's images a step.

    Args:
        gpus: Number of GPUs over all nodes.
        batch_size: Images a GPU and forward pass.
        total: Images a step to reach exactly.
        accumulation: Forward passes a step, worked out from `total` if None.
        nodes: Number of machines, each with the same number of GPUs.
        scale_lr: Accept any total, the learning rate will follow it. `accumulation` is 1 unless given.

    Raises:
        RecipeError: The total cannot be reached exactly. The message names the nearest that can.
    """
    if min(gpus, batch_size, nodes, 1 if accumulation is None else accumulation) < 1:
        raise RecipeError('GPUs, nodes, batch size and accumulation are whole numbers from 1 on.')
    if gpus % nodes:
        raise RecipeError(f'{gpus} GPUs cannot be spread evenly over {nodes} nodes: --gpus counts those of all nodes.')
    if scale_lr:
        return Layout(gpus, batch_size, accumulation or 1, nodes)
    layout = Layout(gpus, batch_size, accumulation or max(1, total // (gpus * batch_size)), nodes)
    if layout.total != total:
        raise RecipeError(f'{layout}, not {total}. {_proposal(layout, total)}')
    return layout


def images_a_step(recipe: str) -> int:
    """Images a step that a recipe's learning rates are for."""
    if recipe not in RECIPES:
        raise RecipeError(f'There is no recipe {recipe}. Recipes: {", ".join(RECIPES)}.')
    return RECIPES[recipe]


def run_name(model: str, recipe: str) -> str:
    """A name for the run folder."""
    name = re.sub(r'[^\w.-]+', '-', model.split(':')[-1])
    return name if recipe == 'imagenet' else f'{name}-{recipe}'


def load_recipe(name: str) -> Dict[str, Any]:
    """The arguments of a recipe as train.py reads them, by their names in the parser's namespace."""
    return yaml.safe_load(_recipe_text(name))


def compose_recipe(model: str, layout: Layout, recipe: str = 'imagenet', **values: Any) -> str:
    """Fit a recipe to a model and a layout.

    Learning rates are scaled by the layout's images a step over the recipe's: unchanged where the two agree.

    Args:
        model: Model name.
        layout: From `plan_layout`.
        recipe: A key of `RECIPES`.
        **values: Further arguments of train.py to set, by their names in the recipe.

    Returns:
        The recipe's YAML with its comments.

    Raises:
        RecipeError: A value for something that the recipe does not set.
    """
    text = _recipe_text(recipe)
    values.update(model=model, batch_size=layout.batch_size, grad_accum_steps=layout.accumulation)
    scale = layout.total / RECIPES[recipe]
    if scale != 1:
        base = load_recipe(recipe)
        values.update({key: float(f'{base[key] * scale:.6g}') for key in _LEARNING_RATES})
    for key, value in values.items():
        text = _set_value(text, key, value)
    scaled = '' if scale == 1 else f' Learning rates: {scale:g} times those for {RECIPES[recipe]} images a step.'
    return f'# {model}, recipe {recipe}: {layout}.{scaled}\n#\n{text}'


def launch_commands(layout: Layout, config: str, run: str, data_dir: Optional[str] = None) -> Dict[str, str]:
    """Command lines that train with as many images a step as the layout, by what they run on.

    Args:
        layout: From `plan_layout`.
        config: Path of the YAML file.
        run: Name of the run folder, below `runs`.
        data_dir: Folder of the images, `$IMAGENET` if None. `$TIMM_SCRIPTS` is the checkout with train.py.
    """
    script = _script_call(config, run, data_dir)
    one_process = f' --grad-accum-steps {layout.accumulation * layout.gpus}' if layout.gpus > 1 else ''
    commands = {'one process': f'python {script}{one_process}'}
    if layout.gpus > 1:
        commands['one node'] = f'torchrun --standalone --nproc_per_node={layout.gpus} {script}'
        nodes = layout.nodes if layout.nodes > 1 else _divisors(layout.gpus)[1]
        commands[f'{nodes} nodes, the same line on each'] = (
            f'torchrun --nnodes={nodes} --nproc_per_node={layout.gpus // nodes} --rdzv_id={shlex.quote(run)} '
            f'--rdzv_backend=c10d --rdzv_endpoint="$HEAD_NODE:29500" {script}'
        )
    return commands


def slurm_script(layout: Layout, config: str, run: str, data_dir: Optional[str] = None, workers: int = 8) -> str:
    """A Slurm batch script that trains on the layout's nodes and goes on from the last epoch when it is queued again.

    Args:
        layout: From `plan_layout`.
        config: Path of the YAML file.
        run: Name of the run folder, below `runs`, and of the job.
        data_dir: Folder of the images, `$IMAGENET` if None.
        workers: CPU processes that load images for a GPU.
    """
    per_node = layout.gpus // layout.nodes
    checkpoint = shlex.quote(f'runs/{run}/last.pth.tar')
    return f'''#!/bin/bash
# {layout}
#SBATCH --job-name={run}
#SBATCH --nodes={layout.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={per_node}
#SBATCH --cpus-per-task={per_node * (workers + 1)}
#SBATCH --output=%x-%j.log
#SBATCH --requeue

set -euo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD_NODE=${{nodes%%$'\\n'*}}  # the first line
resume=()
if [ -e {checkpoint} ]; then resume=(--resume {checkpoint}); fi

srun torchrun --nnodes={layout.nodes} --nproc_per_node={per_node} --rdzv_id="$SLURM_JOB_ID" \\
    --rdzv_backend=c10d --rdzv_endpoint="$HEAD_NODE:29500" \\
    {_script_call(config, run, data_dir)} "${{resume[@]}}"
'''


def _recipe_text(name: str) -> str:
    images_a_step(name)  # refuses a name that is no recipe
    return Path(__file__).with_name('recipes').joinpath(f'{name}.yaml').read_text(encoding='utf-8')


def _set_value(text: str, key: str, value: Any) -> str:
    """Replace the value of a top-level key, and keep the comment behind it."""
    # As an element of a list, because a bare scalar would be followed by an end-of-document mark.
    scalar = yaml.safe_dump([value], default_flow_style=True, width=float('inf')).strip()[1:-1]
    line = re.compile(rf'^{re.escape(key)}:[^#\n]*?(?=\s*(#|$))', re.MULTILINE)
    text, found = line.subn(lambda _: f'{key}: {scalar}', text)
    if found != 1:
        raise RecipeError(f'The recipe does not set {key}.')
    return text


def _script_call(config: str, run: str, data_dir: Optional[str]) -> str:
    data = '"$IMAGENET"' if data_dir is None else shlex.quote(data_dir)
    return (
        f'"$TIMM_SCRIPTS/train.py" -c {shlex.quote(config)} --data-dir {data} '
        f'--output runs --experiment {shlex.quote(run)}'
    )


def _proposal(layout: Layout, total: int) -> str:
    fits = [layout.gpus] if total % layout.gpus == 0 else _around(layout.gpus, _divisors(total))
    exact = [
        Layout(gpus, batch_size, total // (gpus * batch_size))
        for gpus in fits for batch_size in _around(layout.batch_size, _divisors(total // gpus))
    ]
    other = dataclasses.replace(layout, accumulation=max(1, round(total / (layout.gpus * layout.batch_size))))
    listed = '; '.join(f'--gpus {e.gpus} --batch-size {e.batch_size} (accumulation {e.accumulation})' for e in exact)
    return (
        f'Nearest that give {total}: {listed}. Or another total, at the same learning rate per image: '
        f'--scale-lr --accumulation {other.accumulation} ({other.total} images a step).'
    )


def _divisors(number: int) -> List[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _around(number: int, candidates: List[int]) -> List[int]:
    """The nearest of ascending candidates below and above a number, the nearer first, or the number if it is one."""
    if number in candidates:
        return [number]
    below = [c for c in candidates if c < number]
    above = [c for c in candidates if c > number]
    return sorted(below[-1:] + above[:1], key=lambda c: abs(c - number))


def _count(number: int, what: str) -> str:
    return f'{number} {what}' + ('' if number == 1 else 's')
