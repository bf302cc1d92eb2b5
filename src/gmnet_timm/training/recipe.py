"""Recipes for timm's train.py, fitted to the GPUs at hand.

A recipe is a YAML file for `train.py -c`. What stays fixed when the number of GPUs changes is the global batch size:
world size x batch size x gradient accumulation steps. The published one is 2048.
"""
import dataclasses
import math
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from gmnet_timm.errors import UserError
from gmnet_timm.weights.runs import read_yaml

__all__ = [
    'RECIPES', 'Layout', 'compose_recipe', 'global_batch_size', 'launch_commands', 'load_recipe',
    'plan_finetuning', 'plan_layout', 'run_name', 'slurm_script',
]

# recipe -> global batch size that its learning rates are for
RECIPES = {'imagenet': 2048, 'imagenet-fast': 2048, 'finetune': 256, 'frequency': 2048}

_LEARNING_RATES = ('lr', 'warmup_lr', 'min_lr')  # scaled alike, so that the schedule keeps its form

_MAX_NUMBER = 1_000_000

# MiB that a training keeps per image of 224 pixels in float32; tests/test_gmnet_memory.py counts them
_KEPT_MIB = {'gmnet_s1': 48, 'gmnet_s2': 54, 'gmnet_s3': 79, 'gmnet_s4': 120}
_UPDATES = 1000  # that a fine-tuning aims at, within 5 to 100 epochs


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the images of one optimizer step are spread.

    Attributes:
        world_size: Number of processes over all nodes, one per GPU.
        batch_size: Images per process and forward pass.
        grad_accum_steps: Gradient accumulation steps, the forward passes per optimizer step.
        nodes: Number of machines.
    """

    world_size: int
    batch_size: int
    grad_accum_steps: int = 1
    nodes: int = 1

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step."""
        return self.world_size * self.batch_size * self.grad_accum_steps

    @property
    def per_process(self) -> str:
        """The factors that do not depend on the world size."""
        steps = self.grad_accum_steps
        return f'batch size {self.batch_size} x {steps} gradient accumulation step{"s" * (steps != 1)}'

    def __str__(self) -> str:
        return f'world size {self.world_size} x {self.per_process} = global batch size {self.global_batch_size}'


def plan_layout(
        world_size: int,
        batch_size: int,
        *,
        total: int = RECIPES['imagenet'],
        grad_accum_steps: int | None = None,
        nodes: int = 1,
        scale_lr: bool = False,
) -> Layout:
    """Find the gradient accumulation steps with which GPUs and a batch size reach a recipe's global batch size.

    Args:
        world_size: Number of GPUs over all nodes.
        batch_size: Images per GPU and forward pass.
        total: Global batch size to reach exactly.
        grad_accum_steps: Gradient accumulation steps, worked out from `total` if None.
        nodes: Number of machines, each with the same number of GPUs.
        scale_lr: Accept any global batch size, the learning rates will follow it. `grad_accum_steps` is 1 unless given.

    Raises:
        UserError: The global batch size cannot be reached exactly. The message names the nearest that can.
    """
    numbers = (world_size, batch_size, nodes, 1 if grad_accum_steps is None else grad_accum_steps)
    if min(numbers) < 1 or max(numbers) > _MAX_NUMBER:
        raise UserError(
            f'GPUs, nodes, batch size and gradient accumulation steps are whole numbers from 1 to {_MAX_NUMBER:,}.')
    if world_size % nodes:
        raise UserError(
            f'{world_size} GPUs cannot be spread evenly over {nodes} nodes: --gpus counts those of all nodes.')
    if scale_lr:
        return Layout(world_size, batch_size, grad_accum_steps or 1, nodes)
    layout = Layout(world_size, batch_size, grad_accum_steps or max(1, total // (world_size * batch_size)), nodes)
    if layout.global_batch_size != total:
        raise UserError(f'{layout}, not {total}. {_proposal(layout, total)}')
    return layout


def plan_finetuning(model: str, memory_gb: float, images: int | None = None, img_size: int = 224) -> dict[str, int]:
    """Batch size and schedule of a fine-tuning that fits data and memory. Ours, as the recipe is.

    The batch is a power of two from 8 to 256: the largest that half of the memory holds, and that makes at least 20
    updates per epoch. Epochs are as many as make about 1,000 updates, 5 at least and 100 at most.

    Args:
        model: Model name.
        memory_gb: GB of the GPU, or of main memory that the training may take on a CPU.
        images: Number of training images, None if it is not known: the recipe's epochs are kept.
        img_size: Side of the images in pixels.

    Returns:
        Values of the recipe.

    Raises:
        UserError: Not even a batch of 8 fits.
    """
    kept = _KEPT_MIB.get(model, max(_KEPT_MIB.values())) * (img_size / 224) ** 2
    most = min(256., .5 * memory_gb * 1e9 / 2 ** 20 / kept)
    if most < 8:
        raise UserError(f'{memory_gb:g} GB do not hold a batch of 8 images of {img_size} pixels: use smaller images '
                          '(--img-size), or state the batch (--batch-size).')
    if images is None:
        return dict(batch_size=1 << int(math.log2(most)))
    batch_size = 1 << int(math.log2(max(8., min(most, images / 20))))
    epochs = min(100, max(5, round(_UPDATES / max(1, images // batch_size))))
    return dict(batch_size=batch_size, epochs=epochs, warmup_epochs=max(1, epochs // 10))


def global_batch_size(recipe: str) -> int:
    """Global batch size that a recipe's learning rates are for.

    Raises:
        UserError: There is no such recipe.
    """
    if recipe not in RECIPES:
        raise UserError(f'There is no recipe {recipe}. Recipes: {", ".join(RECIPES)}.')
    return RECIPES[recipe]


def run_name(model: str, recipe: str) -> str:
    """A name for the run folder."""
    name = re.sub(r'[^\w.-]+', '-', model.split(':')[-1])
    return name if recipe == 'imagenet' else f'{name}-{recipe}'


def load_recipe(name: str) -> dict[str, Any]:
    """The arguments of a recipe as train.py reads them, by their names in the parser's namespace."""
    return read_yaml(_recipe_path(name))


def compose_recipe(model: str, layout: Layout, recipe: str = 'imagenet', **values: Any) -> str:
    """Fit a recipe to a model and a layout.

    Learning rates are multiplied by the layout's global batch size over the recipe's: unchanged where the two agree.

    Args:
        model: Model name.
        layout: From `plan_layout`.
        recipe: A key of `RECIPES`.
        **values: Further arguments of train.py to set, by their names in the recipe.

    Returns:
        The recipe's YAML with its comments.

    Raises:
        UserError: A value for something that the recipe does not set.
    """
    text = _recipe_path(recipe).read_text(encoding='utf-8')
    values.update(model=model, batch_size=layout.batch_size, grad_accum_steps=layout.grad_accum_steps)
    scale = layout.global_batch_size / RECIPES[recipe]
    if scale != 1:
        base = load_recipe(recipe)
        values.update({key: float(f'{base[key] * scale:.6g}') for key in _LEARNING_RATES})
    for key, value in values.items():
        text = _set_value(text, key, value)
    header = [f'# {model}, recipe {recipe}: {layout}.']
    if scale != 1:
        header.append(f'# Learning rates: {scale:g} times those for a global batch size of {RECIPES[recipe]}.')
    if recipe != 'frequency' and not model.startswith('gmnet_') and ':' not in model:
        header.append(f'# The recipe is made for GmNet, {model} is not one.')
    return '\n'.join([*header, '#', text])


def launch_commands(
        layout: Layout,
        config: str,
        run: str,
        data_dir: str | None = None,
        recipe: str = 'imagenet',
) -> dict[str, str]:
    """Command lines that train with the layout's global batch size, by what they run on.

    Args:
        layout: From `plan_layout`.
        config: Path of the YAML file.
        run: Name of the run folder, below `runs`.
        data_dir: Folder of the images; if None a variable, `$IMAGENET` or, for fine-tuning, `$DATA_DIR`.
            `$TIMM_SCRIPTS` is the checkout with train.py.
        recipe: A key of `RECIPES`.
    """
    script = _script_call(config, run, data_dir, recipe)
    one_process = f' --grad-accum-steps {layout.grad_accum_steps * layout.world_size}' if layout.world_size > 1 else ''
    commands = {'one process': f'python {script}{one_process}'}
    if layout.world_size > 1:
        commands['one node'] = f'torchrun --standalone --nproc_per_node={layout.world_size} {script}'
        nodes = layout.nodes if layout.nodes > 1 else _divisors(layout.world_size)[1]
        commands[f'{nodes} nodes, the same line on each'] = (
            f'torchrun --nnodes={nodes} --nproc_per_node={layout.world_size // nodes} --rdzv_id={shlex.quote(run)} '
            f'--rdzv_backend=c10d --rdzv_endpoint="$HEAD_NODE:29500" {script}'
        )
    return commands


def slurm_script(
        layout: Layout,
        config: str,
        run: str,
        data_dir: str | None = None,
        recipe: str = 'imagenet',
) -> str:
    """A Slurm batch script that trains on the layout's nodes and, queued again, resumes after the last epoch.

    Args:
        layout: From `plan_layout`.
        config: Path of the YAML file.
        run: Name of the run folder, below `runs`, and of the job.
        data_dir: As for `launch_commands`.
        recipe: A key of `RECIPES`.
    """
    per_node = layout.world_size // layout.nodes
    checkpoint = shlex.quote(f'runs/{run}/last.pth.tar')
    return f'''#!/bin/bash
# {layout}
#SBATCH --job-name={run}
#SBATCH --nodes={layout.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={per_node}
#SBATCH --cpus-per-task={9 * per_node}
#SBATCH --output=%x-%j.log
#SBATCH --requeue
# At most what your partition allows. A job that ends here resumes when this script is queued again.
#SBATCH --time=24:00:00
# Most clusters want to know where the job may run and who pays for it: name both, and remove one # of each line.
# `sinfo` lists partitions, `sacctmgr show associations user=$USER` lists accounts.
##SBATCH --partition=PARTITION
##SBATCH --account=ACCOUNT

set -euo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD_NODE=${{nodes%%$'\\n'*}}  # the first line
resume=()
if [ -e {checkpoint} ]; then resume=(--resume {checkpoint}); fi

srun torchrun --nnodes={layout.nodes} --nproc_per_node={per_node} --rdzv_id="$SLURM_JOB_ID" \\
    --rdzv_backend=c10d --rdzv_endpoint="$HEAD_NODE:29500" \\
    {_script_call(config, run, data_dir, recipe)} "${{resume[@]}}"
'''


def _recipe_path(name: str) -> Path:
    global_batch_size(name)  # refuses a name that is not a recipe's
    return Path(__file__).with_name('recipes') / f'{name}.yaml'


def _set_value(text: str, key: str, value: Any) -> str:
    """Replace the value of a top-level key, and keep the comment behind it."""
    # As an element of a list, because a bare scalar would be followed by an end-of-document mark.
    scalar = yaml.safe_dump([value], default_flow_style=True, width=float('inf')).strip()[1:-1]
    line = re.compile(rf'^{re.escape(key)}:[^#\n]*?(?=\s*(#|$))', re.MULTILINE)
    text, found = line.subn(lambda _: f'{key}: {scalar}', text)
    if found != 1:
        raise UserError(f'The recipe does not set {key}.')
    return text


def _script_call(config: str, run: str, data_dir: str | None, recipe: str) -> str:
    variable = '"$DATA_DIR"' if recipe == 'finetune' else '"$IMAGENET"'
    data = variable if data_dir is None else shlex.quote(data_dir)
    return (
        f'"$TIMM_SCRIPTS/train.py" -c {shlex.quote(config)} --data-dir {data} '
        f'--output runs --experiment {shlex.quote(run)}'
    )


def _proposal(layout: Layout, total: int) -> str:
    gpus = layout.world_size
    fits = [gpus] if total % gpus == 0 else _around(gpus, _divisors(total))
    exact = [
        Layout(world_size, batch_size, total // (world_size * batch_size))
        for world_size in fits for batch_size in _around(layout.batch_size, _divisors(total // world_size))
    ]
    other = dataclasses.replace(layout, grad_accum_steps=max(1, round(total / (gpus * layout.batch_size))))
    listed = '; '.join(
        f'--gpus {e.world_size} --batch-size {e.batch_size} (--grad-accum-steps {e.grad_accum_steps})' for e in exact)
    return (
        f'Nearest that give {total}: {listed}. Or another global batch size, at the same learning rate per image: '
        f'--scale-lr --grad-accum-steps {other.grad_accum_steps} (global batch size {other.global_batch_size}).'
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _around(number: int, candidates: list[int]) -> list[int]:
    """The nearest of ascending candidates below and above a number, the nearer first, or the number if it is one."""
    if number in candidates:
        return [number]
    below = [c for c in candidates if c < number]
    above = [c for c in candidates if c > number]
    return sorted(below[-1:] + above[:1], key=lambda c: abs(c - number))
