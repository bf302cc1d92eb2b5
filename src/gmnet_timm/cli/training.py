"""`gmnet-timm recipe` and `check-run`."""
import argparse
import sys

from gmnet_timm.errors import UserError
from gmnet_timm.files import write_text


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
    parser.add_argument('--recipe', default='imagenet', help='imagenet, imagenet-fast or finetune (default: imagenet)')
    parser.add_argument('--gpus', type=int, default=1, help='GPUs over all nodes (default: 1)')
    parser.add_argument('--nodes', type=int, default=1, help='machines (default: 1)')
    parser.add_argument('--batch-size', type=int, default=256, help='images a GPU and forward pass (default: 256)')
    parser.add_argument('--accumulation', type=int, help='forward passes a step (default: what the recipe needs)')
    parser.add_argument('--scale-lr', action='store_true', help='any total, at the same learning rate per image')
    parser.add_argument('--num-classes', type=int, help='number of classes, required by finetune')
    parser.add_argument('--weights', metavar='FILE', help='GmNet checkpoint that finetune starts from')
    parser.add_argument('--data-dir', help='folder of the images in the printed commands (default: $IMAGENET)')
    parser.add_argument('-o', '--output', metavar='FILE', help='write the YAML there and print the commands')
    parser.add_argument('--force', action='store_true', help='replace an existing file')
    parser.add_argument('--slurm', action='store_true', help='print a Slurm batch script for the file of -o')
    parser.add_argument('--check', metavar='FILE', help="check a YAML file of yours against train.py's parser instead")
    parser.add_argument('--train-script', metavar='PATH', help='train.py for --check (default: that in $TIMM_SCRIPTS)')
    parser.set_defaults(run=_run_recipe)


def _run_recipe(args: argparse.Namespace) -> int:
    """Write a training recipe whose GPUs x batch size x accumulation is the published number of images a step."""
    from timm.models import is_model, list_models

    from gmnet_timm.training import recipe as recipes

    if args.check is not None:
        return _check_recipe(args)
    # A name with a scheme, such as hf-hub:, is resolved by train.py
    if args.model is None or not (is_model(args.model) or ':' in args.model):
        raise UserError(f'Which model? {", ".join(list_models("gmnet*"))}, or hf-hub:OWNER/NAME.')
    layout = recipes.plan_layout(
        args.gpus, args.batch_size, total=recipes.images_a_step(args.recipe), accumulation=args.accumulation,
        nodes=args.nodes, scale_lr=args.scale_lr)
    text = recipes.compose_recipe(args.model, layout, args.recipe, **_recipe_values(args))
    if args.slurm and args.output is None:
        raise UserError('--slurm needs -o FILE: the batch script names the YAML file.')
    config = args.output or 'recipe.yaml'
    run = recipes.run_name(args.model, args.recipe)
    commands = ''.join(
        f'# {where}:\n{command}\n'
        for where, command in recipes.launch_commands(layout, config, run, args.data_dir).items()
    )
    if args.output is None:
        print(text)
        print('# To train, with the above in recipe.yaml:')
        print(''.join(f'# {line.removeprefix("# ")}\n' for line in commands.splitlines()), end='')
        return 0
    write_text(args.output, text, force=args.force)
    print(f'{args.output}: {layout}', file=sys.stderr)
    print(recipes.slurm_script(layout, config, run, args.data_dir) if args.slurm else commands, end='')
    return 0


def _recipe_values(args: argparse.Namespace) -> dict:
    if args.recipe != 'finetune' and args.weights is not None:
        raise UserError('--weights is for --recipe finetune. The ImageNet recipes train from scratch.')
    if args.recipe == 'finetune' and args.num_classes is None:
        raise UserError('finetune needs --num-classes, the number of classes of your data.')
    if args.recipe == 'finetune' and args.weights is None and ':' not in args.model:
        raise UserError('finetune needs --weights FILE, or a model hf-hub:OWNER/NAME: it starts from trained weights.')
    values = dict(num_classes=args.num_classes, pretrained_path=args.weights)
    return {key: value for key, value in values.items() if value is not None}


def _check_recipe(args: argparse.Namespace) -> int:
    from gmnet_timm.training.train_parser import check_file, train_script

    script = train_script(args.train_script)
    problems = check_file(args.check, script)
    for problem in problems:
        print(f'{args.check}: {problem}')
    if not problems:
        print(f'{args.check}: every argument is one of {script}')
    return 1 if problems else 0


def _add_check_run(commands) -> None:
    parser = commands.add_parser(
        'check-run',
        help='what a run folder of train.py says: deviations from the recipe, progress, health, what to publish',
        description=_run_check_run.__doc__,
    )
    parser.add_argument('run_dir', help='folder with args.yaml, summary.csv and checkpoints')
    parser.add_argument('--recipe', default='imagenet', help='recipe to compare with (default: imagenet)')
    parser.add_argument('--gpus', type=int, help='GPUs that train, for as long as no checkpoint says it')
    parser.add_argument('--plot', metavar='PNG', help='draw loss, top-1 and learning rate (needs the extra plot)')
    parser.set_defaults(run=_run_check_run)


def _run_check_run(args: argparse.Namespace) -> int:
    """Read a run folder of train.py. The exit status is 1 if the training is not well."""
    from gmnet_timm.training.recipe import images_a_step
    from gmnet_timm.training.run import format_run, plot_run, read_run, symptoms

    images_a_step(args.recipe)  # refuses a name that is no recipe
    run = read_run(args.run_dir)
    print(format_run(run, args.recipe, args.gpus))
    if args.plot is not None:
        plot_run(run, args.plot)
    return 1 if symptoms(run) else 0
