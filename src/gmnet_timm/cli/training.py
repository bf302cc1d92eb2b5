"""`gmnet-timm recipe` and `gmnet-timm check-run`."""
import argparse
import sys
from typing import Any

from gmnet_timm.errors import UserError

__all__ = ['add_commands']


def add_commands(commands) -> None:
    """Declare the commands on the sub-parsers of `gmnet-timm`."""
    _add_recipe(commands)
    _add_check_run(commands)


def _add_recipe(commands) -> None:
    parser = commands.add_parser(
        'recipe',
        help="a training recipe for timm's train.py, fitted to your GPUs, and the command that runs it",
        description=_run_recipe.__doc__,
    )
    parser.add_argument('model', nargs='?', help='model name')
    parser.add_argument(
        '--recipe', default='imagenet', help='imagenet, imagenet-fast, finetune or frequency (default: imagenet)')
    parser.add_argument('--gpus', type=int, default=1, help='GPUs over all nodes (default: 1)')
    parser.add_argument('--nodes', type=int, default=1, help='machines (default: 1)')
    parser.add_argument(
        '--batch-size', type=int,
        help='images per GPU and forward pass (default: 256, for finetune what fits data and memory)')
    parser.add_argument(
        '--memory', type=float, default=8., metavar='GB',
        help='for finetune: of the GPU, or that a CPU may use (default: %(default)g)')
    parser.add_argument('--img-size', type=int, metavar='PIXELS', help='for finetune: of the images (default: 224)')
    parser.add_argument(
        '--grad-accum-steps', type=int, help='gradient accumulation steps (default: what the recipe needs)')
    parser.add_argument(
        '--scale-lr', action='store_true', help='any global batch size, at the same learning rate per image')
    parser.add_argument(
        '--num-classes', type=int, help='number of classes (default for finetune: the folders of --data-dir)')
    parser.add_argument('--pretrained-path', metavar='FILE', help='checkpoint that finetune starts from')
    parser.add_argument(
        '--data-dir', help='folder of the images in the printed commands (default: $IMAGENET, $DATA_DIR for finetune)')
    parser.add_argument('-o', '--output', metavar='FILE', help='write the YAML there and print the commands')
    parser.add_argument('--force', action='store_true', help='replace an existing file')
    parser.add_argument('--slurm', action='store_true', help='print a Slurm batch script for the file of -o')
    parser.set_defaults(run=_run_recipe)


def _run_recipe(args: argparse.Namespace) -> int:
    """Write a training recipe whose GPUs x batch size x gradient accumulation steps is the published global batch size.
    """
    from gmnet_timm.files import write_text
    from gmnet_timm.training import recipe as recipes

    _check_model(args.model)
    total = recipes.global_batch_size(args.recipe)
    values = _finetuning_values(args) if args.recipe == 'finetune' else _imagenet_values(args)
    layout = recipes.plan_layout(
        args.gpus, args.batch_size or values.pop('batch_size', 256), total=total,
        grad_accum_steps=args.grad_accum_steps, nodes=args.nodes, scale_lr=args.scale_lr or args.recipe == 'finetune')
    text = recipes.compose_recipe(args.model, layout, args.recipe, **values)
    if args.slurm and args.output is None:
        raise UserError('--slurm needs -o FILE: the batch script names the YAML file.')
    config = args.output or 'recipe.yaml'
    run = recipes.run_name(args.model, args.recipe)
    commands = ''.join(
        f'# {where}:\n{command}\n'
        for where, command in recipes.launch_commands(layout, config, run, args.data_dir, args.recipe).items()
    )
    if args.recipe == 'finetune' and args.data_dir is None:
        commands = f'# DATA_DIR: your images, as train/CLASS/* and validation/CLASS/*\n{commands}'
    if args.output is None:
        print(text)
        print('# To train, with the above in recipe.yaml:')
        print(''.join(f'# {line.removeprefix("# ")}\n' for line in commands.splitlines()), end='')
        return 0
    write_text(args.output, text, force=args.force)
    print(f'{args.output}: {layout}', file=sys.stderr)
    print(recipes.slurm_script(layout, config, run, args.data_dir, args.recipe) if args.slurm else commands, end='')
    return 0


def _check_model(name: str | None) -> None:
    from timm.models import is_model, list_models

    from gmnet_timm.weights.description import near_names

    ours = f'{", ".join(list_models("gmnet*"))}, or hf-hub:OWNER/NAME'
    if name is None:
        raise UserError(f'Which model? {ours}.')
    if ':' in name or is_model(name):  # train.py resolves a name with a scheme
        return
    raise UserError(f'timm knows no model {name}. {near_names(name)}')


def _imagenet_values(args: argparse.Namespace) -> dict[str, Any]:
    for option in ('pretrained_path', 'img_size'):
        if getattr(args, option) is not None:
            raise UserError(f'--{option.replace("_", "-")} is for --recipe finetune. The ImageNet recipes train from '
                            'scratch on images of 224 pixels.')
    return {} if args.num_classes is None else dict(num_classes=args.num_classes)


def _finetuning_values(args: argparse.Namespace) -> dict[str, Any]:
    from gmnet_timm.training.recipe import plan_finetuning

    if args.pretrained_path is None and ':' not in args.model:
        raise UserError(
            'finetune starts from trained weights: give --pretrained-path FILE, or a model hf-hub:OWNER/NAME.')
    images = None
    if args.data_dir is not None:
        images, classes = _count_images(args.data_dir)
        if args.num_classes not in (None, classes):
            raise UserError(f'{args.data_dir} has {classes} classes, and --num-classes says {args.num_classes}.')
        args.num_classes = classes
    if args.num_classes is None:
        raise UserError('finetune needs your classes: give --data-dir, or --num-classes.')
    values = dict(num_classes=args.num_classes)
    if args.batch_size is None:
        values.update(plan_finetuning(args.model, args.memory, images, args.img_size or 224))
    if args.img_size is not None:
        values.update(img_size=args.img_size)
    if args.pretrained_path is not None:
        values.update(pretrained_path=args.pretrained_path, **_network_of(args.model, args.pretrained_path))
    return {key: value for key, value in values.items() if value is not None}


def _count_images(data_dir: str) -> tuple[int, int]:
    """Training images and classes of a folder, as train.py counts them."""
    from timm.data import create_dataset

    try:
        dataset = create_dataset('', data_dir, split='train')
    except (AssertionError, OSError, RuntimeError, ValueError) as e:
        raise UserError(f'{data_dir} cannot be read as an image folder, train/CLASS/*: {e}') from e
    return len(dataset), len(dataset.reader.class_to_idx)


def _network_of(model: str, path: str) -> dict[str, Any]:
    """Arguments of train.py, besides the name, for the network that weights were trained in."""
    import timm

    from gmnet_timm.cli.options import print_notes
    from gmnet_timm.weights.layouts import named_as
    from gmnet_timm.weights.model import read_source

    source = read_source(path)
    print_notes(source.notes)
    description = source.description
    if description.size != model:
        raise UserError(f'{path} holds a {description.size}, not a {model}.')
    args = dict(description.distinct_args)
    try:  # without strictness, as the head is another one: a file with other names would leave random weights
        model_args, overlay = {**description.full_args, 'num_classes': 0}, dict(file=path)
        started = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **model_args)
        expected = named_as(source.state_dict, started)
        loaded = all(bool((value == expected[key]).all()) for key, value in started.state_dict().items())
    except (KeyError, OSError, RuntimeError, TypeError, ValueError):
        loaded = False
    if not loaded:
        raise UserError(f'train.py cannot start from {path} as it is. `gmnet-timm convert {path} weights.safetensors` '
                        'writes a file that it can: give that.')
    args.pop('in_chans', None)  # train.py adapts the weights to the channels of the images
    return dict(gp=args.pop('global_pool', None), model_kwargs=args or None)


def _add_check_run(commands) -> None:
    parser = commands.add_parser(
        'check-run',
        help='what a run folder of train.py says: deviations from the recipe, progress, health, what to publish',
        description=_run_check_run.__doc__,
    )
    parser.add_argument('run_dir', help='folder with args.yaml, summary.csv and checkpoints')
    parser.add_argument('--recipe', default='imagenet', help='recipe to compare with (default: imagenet)')
    parser.add_argument('--gpus', type=int, help='world size (number of GPUs) until a checkpoint records it')
    parser.set_defaults(run=_run_check_run)


def _run_check_run(args: argparse.Namespace) -> int:
    """Read a run folder of train.py. The exit status is 1 if the training looks unhealthy."""
    from gmnet_timm.training.check import format_run, symptoms
    from gmnet_timm.training.recipe import global_batch_size
    from gmnet_timm.weights.runs import read_run

    global_batch_size(args.recipe)  # refuses a name that is not a recipe's
    if args.gpus is not None and args.gpus < 1:
        raise UserError('--gpus is a whole number from 1 on.')
    run = read_run(args.run_dir)
    print(format_run(run, args.recipe, args.gpus))
    return 1 if symptoms(run) else 0
