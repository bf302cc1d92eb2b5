"""The command line of an experiment: options that all have, and errors as those of `gmnet-timm`."""
import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from gmnet_timm.errors import UserError

__all__ = ['parser_for', 'run_command']


def parser_for(name: str, run: Callable, description: str, output: bool = True) -> argparse.ArgumentParser:
    """A parser with the options --output and --force."""
    parser = argparse.ArgumentParser(f'python -m experiments.{name}', description=description)
    parser.set_defaults(run=run)
    if output:
        parser.add_argument('--output', type=Path, default=Path('output', name), help='(default: %(default)s)')
        parser.add_argument('--force', action='store_true', help='replace the results of an earlier call')
    return parser


def run_command(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """Run an experiment, and return its exit status: 1 for an error that the user can fix."""
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except UserError as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
