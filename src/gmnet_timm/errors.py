"""Errors that tell users what to fix."""
import importlib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user can fix. The command line prints its message alone, without a traceback."""


class TargetExistsError(UserError, FileExistsError):
    """A file or folder is not replaced unasked."""

    def __init__(self, path: str | Path):
        super().__init__(f'{path} exists.')


class MissingExtraError(UserError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed. Install it with: pip install 'gmnet-timm[{extra}]'")


def require(module: str, extra: str) -> Any:
    """Import a module of an extra.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise MissingExtraError(module.partition('.')[0], extra) from e


def printable(text: str) -> str:
    """Text for a terminal: line breaks and control characters, with which a file could forge output, as escapes."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def shown(value: Any, most: int = 100) -> str:
    """A value from a file for a message, cut: aliases of YAML can make a short file a huge value."""
    if isinstance(value, (list, dict, tuple, set)):
        text = reprlib.repr(value)
    else:
        try:
            text = str(value)
        except ValueError:  # Python prints no integers of some thousand digits
            text = 'a number of very many digits'
    return text if len(text) <= most else f'{text[:most - 1]}…'


def listed(keys: Sequence[str], most: int = 5) -> str:
    """The first keys of a list for a message, and how many more there are."""
    more = f' and {len(keys) - most} more' if len(keys) > most else ''
    return ', '.join(keys[:most]) + more
