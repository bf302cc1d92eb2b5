"""Options that several commands share: which model, and how its images are prepared."""
import argparse
import sys
from collections.abc import Sequence
from typing import Any

from gmnet_timm.errors import UserError, printable

PREPROCESSING = ('img_size', 'crop_pct', 'interpolation', 'mean', 'std')
SOURCES = "checkpoint file, output folder of train.py, folder or hf-hub: repository, or NAME=FILE for timm's model NAME"


def add_description(parser: argparse.ArgumentParser) -> None:
    """Options that say which model a source holds, where the source does not."""
    group = parser.add_argument_group('model', 'what the source leaves open; spelled as in train.py')
    group.add_argument(
        '--checkpoint', metavar='NAME', help='file of an output folder (default: model_best.pth.tar, last.pth.tar)')
    group.add_argument('--no-ema', action='store_true', help='ignore EMA weights (default: take them if there are any)')
    group.add_argument(
        '--model-kwargs', nargs='*', default=[], metavar='KEY=VALUE', help='arguments of the model: act_layer=gelu …')
    group.add_argument('--gp', metavar='POOL', help='global pooling: avg, max, avgmax, catavgmax, …')


def add_class_names(parser: argparse.ArgumentParser) -> None:
    """The option that names classes."""
    parser.add_argument(
        '--class-names', metavar='PATH', help='image folder, text file with one name per line, or imagenet-1k')


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """Options that replace recorded preprocessing."""
    group = parser.add_argument_group('preprocessing', 'by default as recorded with the weights')
    group.add_argument('--img-size', type=int, help='height and width in pixels')
    group.add_argument('--crop-pct', type=float, help='centre crop, as a fraction of the resized image')
    group.add_argument('--interpolation', help='bicubic, bilinear, …')
    group.add_argument('--mean', type=float, nargs='+', help='mean, one value or one per channel')
    group.add_argument('--std', type=float, nargs='+', help='standard deviation, one value or one per channel')


def description(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `read_source` and `load_model` from `add_description`."""
    model_kwargs = parse_model_kwargs(args.model_kwargs)
    if args.gp is not None:
        model_kwargs['global_pool'] = args.gp
    return dict(checkpoint=args.checkpoint, use_ema=not args.no_ema, model_kwargs=model_kwargs)


def preprocessing(args: argparse.Namespace) -> dict[str, Any]:
    """What was stated of `add_preprocessing`."""
    stated = {name: getattr(args, name) for name in PREPROCESSING}
    return {name: value for name, value in stated.items() if value is not None}


def stated_words(args: argparse.Namespace) -> list[str]:
    """What was stated of `add_description` and `add_preprocessing`, as words of a command line."""
    words = ['--checkpoint', args.checkpoint] if args.checkpoint is not None else []
    words += ['--no-ema'] if args.no_ema else []
    words += ['--model-kwargs', *args.model_kwargs] if args.model_kwargs else []
    words += ['--gp', args.gp] if args.gp is not None else []
    for name, value in preprocessing(args).items():
        values = value if isinstance(value, list) else [value]
        words += [f'--{name.replace("_", "-")}', *map(str, values)]
    return words


def parse_model_kwargs(words: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` as train.py reads it.

    Raises:
        UserError: A word is not of this form.
    """
    from timm.utils import ParseKwargs

    parsed = argparse.Namespace()
    for word in words:
        if word.count('=') != 1:
            raise UserError(f'--model-kwargs takes KEY=VALUE, not {word!r}.')
    try:
        ParseKwargs([], 'kwargs')(argparse.ArgumentParser(), parsed, words)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise UserError(f'--model-kwargs {" ".join(words)} cannot be read: {e}. Put text in quotes.') from e
    return parsed.kwargs


def starting(what: str) -> None:
    """Say what a command waits for before it has anything to show, on standard error."""
    print(f'{what} …', file=sys.stderr, flush=True)


def print_notes(notes: Sequence[str]) -> None:
    """What was chosen or assumed, on standard error."""
    for note in notes:
        print(f'note: {printable(note)}', file=sys.stderr)
