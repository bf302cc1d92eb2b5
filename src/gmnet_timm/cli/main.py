"""The `gmnet-timm` command: one thin sub-command a capability.

Each `_add_<command>` declares the arguments and the function that runs it. Capabilities are imported by that
function, so that a missing extra only concerns the command that needs it.
"""
import argparse
import os
import sys
from typing import List, Optional

from gmnet_timm import __version__
from gmnet_timm.cli import training
from gmnet_timm.errors import MissingExtraError, UserError


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments, those of the process if None.

    Returns:
        Exit status: 0 for success, 1 for an error that the user can fix, 2 for wrong arguments, 3 for a missing extra,
        130 after Ctrl-C, 141 if nobody reads what is printed.
    """
    args = _parser().parse_args(argv)
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except UserError as e:
        print(f'error: {e}', file=sys.stderr)
        return 3 if isinstance(e, MissingExtraError) else 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would complain again
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='gmnet-timm', description='GmNet (ICLR 2026) for timm.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(metavar='command', required=True)
    _add_demo(commands)
    _add_info(commands)
    _add_freq(commands)
    _add_save(commands)
    _add_push(commands)
    _add_verify(commands)
    _add_convert(commands)
    training.add_commands(commands)
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
    from gmnet_timm.demo.train import run_demo
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
    from timm.models import is_model, list_models

    from gmnet_timm.checkpoint.architecture import infer_architecture, read_state_dict
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
    from gmnet_timm.cli.frequency import add_commands

    parser = commands.add_parser(
        'freq',
        help='what models make of the low and the high frequencies of images',
        description='Band accuracies, learning curves, pictures and layer spectra, for any model of timm.',
    )
    add_commands(parser.add_subparsers(metavar='command', required=True))


def _add_save(commands) -> None:
    parser = commands.add_parser(
        'save', help='write a folder that timm and transformers load, with a model card', description=_run_save.__doc__)
    _add_source_arguments(parser)
    parser.add_argument('folder', help='folder to write, loaded as local-dir:FOLDER')
    parser.add_argument(
        '--repo-id', metavar='OWNER/NAME', help="repository that the card's examples load (default: FOLDER)")
    parser.add_argument('--force', action='store_true', help='replace the files in an existing folder')
    parser.set_defaults(run=_run_save)


def _run_save(args: argparse.Namespace) -> None:
    """Write model.safetensors, config.json and README.md, and check that timm loads them to identical logits."""
    from gmnet_timm.publishing.push import save_folder

    folder = save_folder(
        _source(args), args.folder, repo_id=args.repo_id, license=args.license, datasets=args.dataset, force=args.force,
        overwrite_card=args.overwrite_card)
    print(f'{folder}: written, loads with timm.create_model(\'local-dir:{folder}\', pretrained=True), identical logits')


def _add_push(commands) -> None:
    parser = commands.add_parser(
        'push', help='publish a checkpoint on the Hugging Face Hub, verified', description=_run_push.__doc__)
    _add_source_arguments(parser)
    parser.add_argument('repo_id', metavar='owner/name', help='repository, created if it does not exist')
    parser.add_argument('--dry-run', action='store_true', help='send nothing, write what would be sent to a folder')
    parser.add_argument('--folder', help='folder for --dry-run (default: the name of the repository)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    parser.add_argument('--revision', help='branch to commit to, created if it does not exist (default: main)')
    parser.add_argument('--message', help='summary of the commit')
    parser.add_argument('--token', help='access token (default: HF_TOKEN, or that of `hf auth login`)')
    parser.set_defaults(run=_run_push)


def _run_push(args: argparse.Namespace) -> None:
    """Publish weights, configuration and model card as one commit, and read the commit back."""
    from gmnet_timm.publishing.push import push, save_folder

    if args.dry_run:
        if '/' not in args.repo_id:
            raise UserError(f'--dry-run does not ask the Hub who you are: give owner/{args.repo_id}.')
        folder = save_folder(
            _source(args), args.folder or args.repo_id.split('/')[-1], repo_id=args.repo_id, license=args.license,
            datasets=args.dataset, overwrite_card=args.overwrite_card)
        print(f'{folder}: what would be sent to {args.repo_id}; nothing was sent')
        return
    published = push(
        _source(args), args.repo_id, license=args.license, datasets=args.dataset, overwrite_card=args.overwrite_card,
        private=args.private, revision=args.revision, create_pr=args.create_pr, message=args.message, token=args.token)
    for name, sha256 in published.sha256.items():
        print(f'{name:<18} sha256 {sha256}')
    if published.card_kept:
        print('README.md          kept as it was (--overwrite-card replaces it)')
    print(f'{published.repo_id} at {published.commit}: published, read back and compared\n{published.url}')


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('source', help='checkpoint file, output folder of train.py, or folder for local-dir:')
    parser.add_argument(
        '--checkpoint', metavar='NAME', help='file of an output folder (default: model_best.pth.tar, last.pth.tar)')
    parser.add_argument('--use-ema', action='store_true', help='take the averaged weights')
    parser.add_argument('--classes', help='class names: a folder of images, a text file, or imagenet-1k')
    parser.add_argument('--img-size', type=int, help='preprocessing: height and width in pixels')
    parser.add_argument('--crop-pct', type=float, help='preprocessing: centre crop, as part of the resized image')
    parser.add_argument('--interpolation', help='preprocessing: bicubic, bilinear, …')
    parser.add_argument('--mean', type=float, nargs='+', help='preprocessing: mean of the channels')
    parser.add_argument('--std', type=float, nargs='+', help='preprocessing: standard deviation of the channels')
    parser.add_argument('--top1', type=float, help='measured top-1 accuracy in percent (default: that of summary.csv)')
    parser.add_argument('--top5', type=float, help='measured top-5 accuracy in percent')
    parser.add_argument('--results', metavar='CSV', help="results file of timm's validate.py for these weights")
    parser.add_argument('--dataset', action='append', default=[], metavar='ID', help='training data, an id on the Hub')
    parser.add_argument('--license', help='licence of the weights (default: that of the source, else apache-2.0)')
    parser.add_argument('--overwrite-card', action='store_true', help='write a new model card even where there is one')


def _source(args: argparse.Namespace):
    """Read what the arguments of `_add_source_arguments` name, and print what had to be assumed."""
    from gmnet_timm.publishing.source import read_source

    preprocessing = {name: getattr(args, name) for name in ('img_size', 'crop_pct', 'interpolation', 'mean', 'std')}
    metrics = {name: getattr(args, name) for name in ('top1', 'top5')}
    source = read_source(
        args.source,
        checkpoint=args.checkpoint,
        use_ema=args.use_ema,
        classes=args.classes,
        preprocessing={name: value for name, value in preprocessing.items() if value is not None},
        metrics={name: value for name, value in metrics.items() if value is not None},
        results_file=args.results,
    )
    for note in source.notes:
        print(f'note: {note}', file=sys.stderr)
    if source.card is not None and not args.overwrite_card:
        print('note: The card beside the weights is kept (--overwrite-card writes a new one).', file=sys.stderr)
    return source


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        'verify', help='check a published repository or a folder', description=_run_verify.__doc__)
    parser.add_argument('name', help='owner/name[@revision] on the Hub, or a folder')
    parser.add_argument('--token', help='access token (default: HF_TOKEN, or that of `hf auth login`)')
    parser.set_defaults(run=_run_verify)


def _run_verify(args: argparse.Namespace) -> int:
    """Check weights, configuration, card and logits. The exit status is 1 if a check fails."""
    from gmnet_timm.publishing.push import verify

    checks = verify(args.name, token=args.token)
    for check in checks:
        print(f'{ {True: "ok", False: "FAILED", None: "note"}[check.ok]:<7} {check.name + ":":<10} {check.detail}')
    return int(any(check.ok is False for check in checks))


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        'convert', help='write weights in another format or precision', description=_run_convert.__doc__)
    parser.add_argument('source', help='checkpoint file')
    parser.add_argument('target', help='file to write: .safetensors, .pth (bare weights) or .pth.tar (as by train.py)')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), help='precision (default: unchanged)')
    parser.add_argument('--use-ema', action='store_true', help='take the averaged weights')
    parser.add_argument('--force', action='store_true', help='replace an existing file')
    parser.set_defaults(run=_run_convert)


def _run_convert(args: argparse.Namespace) -> None:
    """Write the weights of a checkpoint to another file. Optimizer state and the like are left behind."""
    import torch

    from gmnet_timm.checkpoint.convert import convert
    from gmnet_timm.checkpoint.integrity import protection, weights_sha256

    dtype = getattr(torch, args.dtype) if args.dtype else None
    state_dict = convert(args.source, args.target, dtype=dtype, use_ema=args.use_ema, force=args.force)
    checked = protection(args.source)
    print(
        f'{args.target}: {len(state_dict)} tensors from {args.source}, '
        f'{f"checked against its {checked}" if checked else "which has no checksum, so a flipped bit goes unnoticed"}')
    print(f'weights sha256 {weights_sha256(state_dict)}')
