"""`gmnet-timm save`, `push` and `verify`."""
import argparse
import sys

from gmnet_timm.cli.options import (
    SOURCES,
    add_class_names,
    add_description,
    add_preprocessing,
    description,
    preprocessing,
    print_notes,
)
from gmnet_timm.errors import UserError, listed, printable


def add_commands(commands) -> None:
    """Declare the commands on the sub-parsers of `gmnet-timm`."""
    _add_save(commands)
    _add_push(commands)
    _add_verify(commands)


def _add_save(commands) -> None:
    parser = commands.add_parser(
        'save', help='write a folder that timm and transformers load, with a model card', description=_run_save.__doc__)
    _add_publication(parser, 'folder', 'folder to write, loaded as local-dir:FOLDER')
    parser.add_argument(
        '--repo-id', metavar='OWNER/NAME', help="repository that the card's examples load (default: FOLDER)")
    parser.add_argument('--force', action='store_true', help='replace the files in an existing folder')
    parser.set_defaults(run=_run_save)


def _run_save(args: argparse.Namespace) -> None:
    """Write model.safetensors, config.json and README.md, and compare what timm loads from them with the source."""
    _save(args, args.folder, args.repo_id, args.force)


def _save(args: argparse.Namespace, folder: str, repo_id: str | None, force: bool) -> None:
    """What `save` and `push --dry-run` do alike."""
    from gmnet_timm.hub.save import save_folder

    saved = save_folder(_publication(args), folder, repo_id=repo_id, force=force, **_choices(args))
    print(f"{saved.path}: written. timm.create_model('local-dir:{saved.path}', pretrained=True) loads it.")
    print(_compared(saved.compared_with))
    if saved.others:
        print_notes([f'{saved.path} still has other weights: {listed(saved.others)}. Remove what is out of date.'])


def _compared(original: str | None) -> str:
    if original is None:
        return ('compared                 not possible: the source holds tensors alone, and does not say which model '
                'they belong to')
    return f'compared                 the same logits as {original}'


def _add_push(commands) -> None:
    parser = commands.add_parser(
        'push', help='publish a checkpoint on the Hugging Face Hub, verified', description=_run_push.__doc__)
    _add_publication(parser, 'repo_id', 'owner/name of the repository, created if it does not exist')
    parser.add_argument('--dry-run', action='store_true', help='send nothing, write what would be sent to a folder')
    parser.add_argument('--folder', help='folder for --dry-run (default: the name of the repository)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    parser.add_argument('--revision', help='branch to commit to, created if it does not exist (default: main)')
    parser.add_argument('--message', help='summary of the commit')
    _add_hub(parser)
    parser.set_defaults(run=_run_push)


def _run_push(args: argparse.Namespace) -> None:
    """Publish weights, configuration and model card as one commit, and read the commit back."""
    check_repo_id(args.repo_id)
    if args.dry_run:
        if '/' not in args.repo_id:
            raise UserError(f'--dry-run does not ask the Hub who you are: give owner/{args.repo_id}.')
        _save(args, args.folder or args.repo_id.split('/')[-1], args.repo_id, force=False)
        print(f'This would be sent to {args.repo_id}; nothing was sent.')
        return
    from gmnet_timm.hub.push import push

    published = push(
        _publication(args), args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr,
        message=args.message, token=args.token, timeout=args.timeout, **_choices(args))
    for name, sha256 in published.sha256.items():
        print(f'{name:<24} sha256 {sha256}')
    if published.card_kept:
        print('README.md                kept as it was (--overwrite-card replaces it)')
    print(_compared(published.compared_with))
    if published.others:
        print_notes([
            f'{published.repo_id} still has other weights: {listed(published.others)}. '
            f'`hf repos delete-files {published.repo_id} FILE` removes what is out of date.'])
    print(f'{published.repo_id} at {published.commit}: published, read back and compared\n{published.url}')


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UserError: It cannot.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise UserError(f'{repo_id!r} cannot be the name of a repository: letters, digits, -, _ and ., as in '
                        f'owner/name. {e}') from e


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        'verify', help='check a published repository or a folder', description=_run_verify.__doc__)
    parser.add_argument('name', help='owner/name[@revision] on the Hub, or a folder')
    _add_hub(parser)
    parser.set_defaults(run=_run_verify)


def _run_verify(args: argparse.Namespace) -> int:
    """Check weights, configuration, card and logits. The exit status is 1 if a check fails."""
    from gmnet_timm.hub.verify import verify

    checks = verify(args.name, token=args.token, timeout=args.timeout)
    for check in checks:
        verdict = {True: 'ok', False: 'FAILED', None: 'note'}[check.ok]
        print(f'{verdict:<7} {check.name + ":":<10} {printable(check.detail)}')
    return int(any(check.ok is False for check in checks))


def _add_publication(parser: argparse.ArgumentParser, target: str, help: str) -> None:
    parser.add_argument('source', help=SOURCES)
    parser.add_argument(target, help=help)
    add_description(parser)
    add_preprocessing(parser)
    add_class_names(parser)
    parser.add_argument('--top1', type=float, help='measured top-1 accuracy in percent (default: that of summary.csv)')
    parser.add_argument('--top5', type=float, help='measured top-5 accuracy in percent')
    parser.add_argument('--results', metavar='CSV', help="results file of timm's validate.py for these weights")
    parser.add_argument(
        '--train-dataset', action='append', default=[], metavar='ID', help='training data, an id on the Hub')
    parser.add_argument('--license', help='licence of the weights (default: that of the source, else none is claimed)')
    parser.add_argument('--overwrite-card', action='store_true', help='write a new model card even where there is one')
    parser.add_argument(
        '--onnx', action='store_true',
        help='also write onnx/model.onnx, fused, for ONNX Runtime and browsers (needs the extra onnx)')


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--token', help='access token (default: HF_TOKEN, or that of `hf auth login`)')
    parser.add_argument(
        '--timeout', type=float, default=120., metavar='S', help='seconds to wait for an answer (default: 120)')


def _publication(args: argparse.Namespace):
    """Read what the arguments of `_add_publication` name, and print what had to be chosen or assumed."""
    from gmnet_timm.hub.publication import collect_publication
    from gmnet_timm.weights.model import read_source

    source = read_source(
        args.source, class_names=args.class_names, preprocessing=preprocessing(args), **description(args))
    metrics = {name: value for name in ('top1', 'top5') if (value := getattr(args, name)) is not None}
    publication = collect_publication(source, metrics, args.results)
    print_notes(publication.notes)
    if publication.card is not None and not args.overwrite_card:
        print('note: The card beside the weights is kept (--overwrite-card writes a new one).', file=sys.stderr)
    if args.license is None and publication.license is None:
        print('note: No licence is claimed for these weights. Say what holds for them by --license.', file=sys.stderr)
    return publication


def _choices(args: argparse.Namespace) -> dict:
    return dict(
        license=args.license,
        train_datasets=args.train_dataset,
        overwrite_card=args.overwrite_card,
        stated_preprocessing=bool(preprocessing(args)),
        onnx=args.onnx,
    )
