"""The entry point of `gmnet-timm`: sub-commands, exit statuses and what errors look like.

Each sub-command declares its arguments and the function that runs it. Capabilities, and with them torch and timm, are
imported by that function: `--help` is there at once, and a missing extra only concerns the command that needs it.
"""
import argparse
import os
import sys

from gmnet_timm import __version__
from gmnet_timm.cli import completion, demo, frequency, models, publishing, training
from gmnet_timm.errors import MissingExtraError, UserError, printable


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
    try:
        status = args.run(args) or 0
        if sys.stdout is not None:  # it is None where the process was started without one
            sys.stdout.flush()
        return status
    except UserError as e:
        print(f'error: {printable(str(e))}', file=sys.stderr)
        return 3 if isinstance(e, MissingExtraError) else 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        _close_stdout()
        return 141
    except OSError as e:
        if e.filename is not None:
            raise
        _close_stdout()
        print(f'error: the output cannot be written: {e.strerror}', file=sys.stderr)
        return 1


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
    for module in (demo, models, publishing, training, frequency, completion):
        module.add_commands(commands)
    return parser


def _close_stdout() -> None:
    """Flushing at exit would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
