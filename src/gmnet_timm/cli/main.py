"""The entry point of `gmnet-timm`: sub-commands, exit statuses and what errors look like.

Each sub-command declares its arguments and the function that runs it. Capabilities, and with them torch and timm, are
imported by that function: `--help` is there at once, and a missing extra only concerns the command that needs it.
"""
import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from gmnet_timm import __version__
from gmnet_timm.cli import demo, frequency, hub, models, training
from gmnet_timm.cli.options import starting
from gmnet_timm.errors import MissingExtraError, TargetExistsError, UserError, printable


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments, those of the process if None.

    Returns:
        Exit status: 0 for success, 1 for an error that the user can fix, 2 for wrong arguments, 3 for a missing extra,
        130 after Ctrl-C, 141 if nobody reads what is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a terminal of another encoding gets escapes instead of a failure
            stream.reconfigure(errors='backslashreplace')
    args = build_parser().parse_args(argv)
    logger = logging.getLogger('gmnet_timm')
    handler = _Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        if 'torch' not in sys.modules and sys.stderr is not None and sys.stderr.isatty():
            starting('Loading torch and timm')  # for seconds there is nothing else to see
        with contextlib.redirect_stdout(_Output(sys.stdout) if sys.stdout is not None else None):
            status = args.run(args) or 0
            if sys.stdout is not None:  # it is None where the process was started without one
                sys.stdout.flush()
        return status
    except _OutputError as e:
        _close_stdout()
        print(f'error: {e}', file=sys.stderr)
        return 1
    except UserError as e:
        hint = _hint(args) if isinstance(e, TargetExistsError) else ''
        print(f'error: {printable(str(e))}{hint}', file=sys.stderr)
        return 3 if isinstance(e, MissingExtraError) else 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        _close_stdout()
        return 141
    finally:
        logger.removeHandler(handler)


class _OutputError(Exception):
    """Standard output cannot be written."""


class _Output:
    """Standard output whose failures are told from those of other files."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._failing():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as e:
            raise _OutputError(f'the output cannot be written: {e.strerror}') from e


class _Handler(logging.Handler):
    """What the library logs: progress as it is, the rest with its level, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        level = '' if record.levelno <= logging.INFO else f'{record.levelname.lower()}: '
        print(f'{level}{printable(record.getMessage())}', file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Unknown arguments of a command are reported with its usage. argparse would show the usage of the program."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}')
        return namespace, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog='gmnet-timm', description='GmNet (ICLR 2026) for timm.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(metavar='command', required=True)
    for module in (demo, models, hub, training, frequency):
        module.add_commands(commands)
    return parser


def _hint(args: argparse.Namespace) -> str:
    """What to type where something exists already."""
    for option in ('folder', 'output'):
        if hasattr(args, option) and (option == 'output' or hasattr(args, 'dry_run')):
            other = f' Choose another by --{option}'
            break
    else:
        other = ' Choose another name'
    return f'{other}, or give --force to replace it.' if hasattr(args, 'force') else f'{other}.'


def _close_stdout() -> None:
    """Flushing at exit would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
