"""`gmnet-timm info` and `convert`."""
import argparse
from pathlib import Path

from gmnet_timm.cli.options import SOURCES, add_description, description, print_notes
from gmnet_timm.errors import UserError, printable


def add_commands(commands) -> None:
    """Declare the commands on the sub-parsers of `gmnet-timm`."""
    _add_info(commands)
    _add_convert(commands)


def _add_info(commands) -> None:
    parser = commands.add_parser(
        'info',
        help='sizes, cost, provenance and weights of the models, or what a file or folder holds',
        description=_run_info.__doc__,
    )
    parser.add_argument('model', nargs='?', help=f'model name, {SOURCES} (default: a table of all models)')
    add_description(parser)
    parser.set_defaults(run=_run_info)


def _run_info(args: argparse.Namespace) -> None:
    """Print sizes, multiply-adds, provenance and weights of a model, or what a file or folder holds."""
    from gmnet_timm.checkpoint.description import is_model_name, near_names
    from gmnet_timm.info import PAPER, format_model, format_source, format_table, model_info
    from gmnet_timm.source import read_source

    if args.model is None:
        print(format_table([model_info(name) for name in PAPER]))
    elif args.model.startswith('hf-hub:') or Path(args.model.partition('=')[2] or args.model.removeprefix(
            'local-dir:')).exists():
        source = read_source(args.model, **description(args))
        print('\n'.join(map(printable, format_source(source).splitlines())))
        print_notes(source.notes)
    elif is_model_name(args.model):
        print(format_model(model_info(args.model)))
    else:
        raise UserError(f'{args.model} is neither a model nor a file or folder. {near_names(args.model)}')


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        'convert', help='write weights in another format or precision', description=_run_convert.__doc__)
    parser.add_argument('source', help=SOURCES)
    parser.add_argument('target', help='file to write: .safetensors, .pth (bare weights) or .pth.tar (as by train.py)')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), help='precision (default: unchanged)')
    parser.add_argument('--force', action='store_true', help='replace an existing file')
    add_description(parser)
    parser.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> None:
    """Write the weights of a checkpoint, and what it says of its model, to another file."""
    import torch

    from gmnet_timm.checkpoint.convert import convert
    from gmnet_timm.checkpoint.integrity import weights_sha256
    from gmnet_timm.source import read_source

    source = read_source(args.source, **description(args))
    print_notes(source.notes)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    state_dict = convert(source.checkpoint, source.description, args.target, dtype=dtype, force=args.force)
    checked = source.checkpoint.protection
    print(
        f'{args.target}: {len(state_dict)} tensors from {source.checkpoint.path}, '
        f'{f"checked against its {checked}" if checked else "which has no checksum, so a flipped bit goes unnoticed"}')
    if args.target.endswith(('.pth', '.pt', '.bin')):
        print(f'{args.target} records no model. It is {source.description}')
    print(f'weights sha256 {weights_sha256(state_dict)}')
