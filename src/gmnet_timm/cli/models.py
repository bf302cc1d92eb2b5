"""`gmnet-timm info`, `predict` and `convert`."""
import argparse

from gmnet_timm.cli.options import SOURCES, add_description, add_preprocessing, description, print_notes
from gmnet_timm.errors import UserError, printable


def add_commands(commands) -> None:
    """Declare the commands on the sub-parsers of `gmnet-timm`."""
    _add_info(commands)
    _add_predict(commands)
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
    from gmnet_timm.info import PAPER, format_model, format_source, format_table, model_info
    from gmnet_timm.weights.description import is_model_name, near_names
    from gmnet_timm.weights.model import read_source, split_spec

    if args.model is None:
        print(format_table([model_info(name) for name in PAPER]))
    elif args.model.startswith(('hf-hub:', 'hf_hub:')) or split_spec(args.model)[1].exists():
        source = read_source(args.model, **description(args))
        print('\n'.join(map(printable, format_source(source).splitlines())))
        print_notes(source.notes)
    elif is_model_name(args.model):
        print(format_model(model_info(args.model)))
    else:
        on_hub = args.model.count('/') == 1 and not args.model.startswith(('/', '.'))
        hint = f' A repository on the Hub is hf-hub:{args.model}.' if on_hub else ''
        near = '' if on_hub else f' {near_names(args.model)}'
        raise UserError(f'{args.model} is neither a model nor a file or folder.{hint}{near}')


def _add_predict(commands) -> None:
    parser = commands.add_parser(
        'predict', help='the likeliest classes of pictures', description=_run_predict.__doc__)
    parser.add_argument('model', help=f"{SOURCES}, or a name of timm's with pretrained weights")
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='PNG, JPEG, WebP, BMP, TIFF or an array (.npy)')
    parser.add_argument('--top', type=int, default=5, metavar='K', help='print the K likeliest (default: %(default)s)')
    parser.add_argument(
        '--class-names', metavar='PATH', help='image folder, text file with one name per line, or imagenet-1k')
    add_description(parser)
    add_preprocessing(parser)
    parser.set_defaults(run=_run_predict)


def _run_predict(args: argparse.Namespace) -> None:
    """Print the likeliest classes of pictures, upright, with the preprocessing of the model.

    The accuracy over a folder is what timm's validate.py measures.
    """
    if args.top < 1:
        raise UserError(f'--top must be positive, got {args.top}.')
    import torch

    from gmnet_timm.cli.frequency_options import load, names_of_classes
    from gmnet_timm.frequency.answers import class_probabilities, top_classes
    from gmnet_timm.frequency.data import prepare_picture, read_picture

    model = load(args.model, args)
    names = names_of_classes(args, model)
    width = max(map(len, args.images))
    for file in args.images:
        picture = prepare_picture(read_picture(file, model.data_config['input_size'][0]), model.data_config)
        with torch.inference_mode():
            found = top_classes(class_probabilities(model.model(picture))[0], args.top, names)
        answers = ', '.join(f'{printable(name)} {100 * p:.1f} %' for name, p in found)
        print(f'{printable(file):<{width}}  {answers}')


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        'convert', help='write weights in another format or precision', description=_run_convert.__doc__)
    parser.add_argument('source', help=SOURCES)
    parser.add_argument('target', help='file to write: .safetensors, .pth (bare weights) or .pth.tar (as by train.py)')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), help='precision (default: unchanged)')
    parser.add_argument(
        '--layout', choices=['authors', 'timm'], help="names of the authors' files, or of timm's pull request 2677 "
        '(default: those of the model that is registered here)')
    parser.add_argument('--force', action='store_true', help='replace an existing file')
    add_description(parser)
    parser.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> None:
    """Write the weights of a checkpoint, and what it says of its model, to another file."""
    import torch

    from gmnet_timm.weights.convert import cast, save_weights
    from gmnet_timm.weights.layouts import named_as, to_timm
    from gmnet_timm.weights.model import read_source

    source = read_source(args.source, **description(args))
    print_notes(source.notes)
    if not source.description.is_gmnet:
        raise UserError(f'{source.checkpoint.path} holds a {source.description.name}, which is not a GmNet.')
    state_dict = named_as(source.state_dict, source.description.create(device='meta'))
    if args.layout:
        state_dict = to_timm(source.state_dict) if args.layout == 'timm' else source.state_dict
    state_dict = cast(state_dict, getattr(torch, args.dtype)) if args.dtype else state_dict
    sha256 = save_weights(state_dict, args.target, source.description, force=args.force)
    checked = source.checkpoint.protection
    print(
        f'{args.target}: {len(state_dict)} tensors from {source.checkpoint.path}, '
        f'{f"checked against its {checked}" if checked else "which has no checksum, so a flipped bit goes unnoticed"}')
    if args.target.endswith(('.pth', '.pt', '.bin')):
        print(f'{args.target} records no model. It is {source.description}')
    print(f'weights sha256 {sha256}')
