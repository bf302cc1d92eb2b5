"""The `gmnet-timm` command: one thin sub-command a capability.

Each `_add_<command>` declares the arguments and the function that runs it. Capabilities are imported by that
function, so that a missing extra only concerns the command that needs it.
"""
import argparse
import sys
from typing import List, Optional

from gmnet_timm import __version__
from gmnet_timm.errors import UserError


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments, those of the process if None.

    Returns:
        Exit status: 0 for success, 1 for an error that the user can mend, 2 for wrong arguments, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except UserError as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='gmnet-timm', description='GmNet (ICLR 2026) for timm.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(metavar='command', required=True)
    _add_demo(commands)
    _add_info(commands)
    _add_freq(commands)
    return parser


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        'demo',
        help='train on photographs for a minute or two and show what happened',
        description=_run_demo.__doc__,
        argument_default=argparse.SUPPRESS,  # a resumed run keeps its own settings, so only those given are passed on
    )
    parser.add_argument('--output', default='output/demo', help='folder for everything written, default: output/demo')
    parser.add_argument('--resume', action='store_true', help='go on with the run in the output folder')
    parser.add_argument('--model', help='default: gmnet_s1')
    parser.add_argument('--epochs', type=int, help='default: 5')
    parser.add_argument('--batch-size', type=int, help='default: 32')
    parser.add_argument('--lr', type=float, help='default: 3e-3')
    parser.add_argument('--patches', type=int, help='training patches a class, default: 320')
    parser.add_argument('--seed', type=int, help='default: 42')
    parser.add_argument('--device', help='default: a GPU if there is one')
    parser.add_argument('--workers', type=int, help='processes that load patches, default: 0')
    parser.set_defaults(run=_run_demo)


def _run_demo(args: argparse.Namespace) -> None:
    """Train a GmNet to tell patches of eight photographs apart, in at most three minutes on two CPU cores.

    The photographs come with scikit-image. Validation patches are from rows of them that training does not see. This
    shows that training, resuming, saving and loading work; it does not measure how well new photographs are recognised,
    nor anything about ImageNet.
    """
    from gmnet_timm.demo import run_demo
    print(run_demo(**{name: value for name, value in vars(args).items() if name != 'run'}))


def _add_info(commands) -> None:
    parser = commands.add_parser(
        'info',
        help='sizes, cost, provenance and weights of the models, or what a checkpoint holds',
        description=_run_info.__doc__,
    )
    parser.add_argument('model', nargs='?', help='a model name or a checkpoint file (default: a table of all models)')
    parser.set_defaults(run=_run_info)


def _run_info(args: argparse.Namespace) -> None:
    """Print sizes, multiply-adds, provenance and weights of a model, or what a checkpoint file holds."""
    import os

    from timm.models import is_model, list_models

    from gmnet_timm.checkpoint import infer_architecture, read_state_dict
    from gmnet_timm.info import PAPER, format_model, format_table, model_info

    if args.model is None:
        print(format_table([model_info(name) for name in PAPER]))
    elif is_model(args.model):
        print(format_model(model_info(args.model)))
    elif os.path.exists(args.model):
        print(infer_architecture(read_state_dict(args.model)).describe())
    else:
        raise UserError(
            f'{args.model} is neither a model nor a checkpoint file. Models: {", ".join(list_models("gmnet*"))}.')


def _add_freq(commands) -> None:
    from gmnet_timm.frequency.cli import add_commands

    parser = commands.add_parser(
        'freq',
        help='what models make of the low and the high frequencies of images',
        description='Band accuracies, learning curves, pictures and layer spectra, for any model of timm.',
    )
    add_commands(parser.add_subparsers(metavar='command', required=True))
