"""Writing files and folders whole or not at all, and saying where it failed."""
import contextlib
import errno
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from gmnet_timm.errors import UserError

__all__ = ['replacing', 'replacing_folder', 'write_text', 'writing']

# .gmnet-timm-KIND-HOST-PID-RANDOM-NAME: whose it is, so that what a killed process left behind can be told
_TEMPORARY = re.compile(r'\.gmnet-timm-(new|old)-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}-(.*)', re.DOTALL)


@contextlib.contextmanager
def replacing(path: str | Path, force: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place at the end of the block, and vanishes if the block raises.

    Folders on the way are created. What killed processes left of earlier attempts is removed.

    Raises:
        UserError: `path` exists and `force` is not set, is a device, pipe or folder, or cannot be written.
    """
    path = Path(path)
    # os.path's functions answer False where Path's raise, for a name that is too long
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path} is not a regular file and is not replaced: choose another name.')
    if os.path.exists(path) and not force:
        raise UserError(f'{path} exists: choose another name, or give --force to replace it.')
    temporary = _temporary(path, 'new')
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clean(path)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # mostly, that it is not there
            temporary.unlink()


@contextlib.contextmanager
def replacing_folder(path: str | Path, force: bool = True) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place whole at the end of the block, or vanishes.

    An existing folder is copied into it first: what the block does not replace, stays. Where a process is killed
    between the two renames that swap them, the next call puts the old folder back before anything else.

    Raises:
        UserError: `path` exists and `force` is not set, is not a folder, or cannot be written.
    """
    path = Path(os.path.realpath(path))
    temporary, old = _temporary(path, 'new'), _temporary(path, 'old')
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _clean(path)
            if path.exists() and not path.is_dir():
                raise UserError(f'{path} is not a folder: choose another name.')
            if path.exists() and not force:
                raise UserError(f'{path} exists: choose another name, or give --force to replace the files in it.')
            if path.exists():
                shutil.copytree(path, temporary, symlinks=True)
            else:
                temporary.mkdir()
        yield temporary
        with writing(path):
            if path.exists():
                path.rename(old)
            temporary.rename(path)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: str | Path, text: str, force: bool = True) -> None:
    """Write a text file; arguments and errors as for `replacing`."""
    with replacing(path, force=force) as temporary:
        temporary.write_text(text, encoding='utf-8', newline='')


@contextlib.contextmanager
def writing(path: Path, hint: str = '') -> Iterator[None]:
    """Turn what goes wrong while writing into an error that says where. torch reports a full disk as RuntimeError.

    Args:
        path: What is written.
        hint: What the user can do then.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        if isinstance(e, UserError):
            raise
        existing = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
        free = shutil.disk_usage(existing).free / 1e6
        full = getattr(e, 'errno', None) == errno.ENOSPC or free < 1
        reason = 'the disk is full' if full else str(e)
        raise UserError(f'Cannot write {path}: {reason} ({free:,.0f} MB free).{hint}') from e


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f'.gmnet-timm-{kind}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}')


def _host() -> str:
    """This machine in eight characters: on a shared disk, a process of another one is not known to be dead."""
    return f'{zlib.crc32(os.uname().nodename.encode()):08x}' if hasattr(os, 'uname') else '0' * 8


def _clean(path: Path) -> None:
    """Remove what dead processes left of attempts to write `path`, and put back a folder that one had moved away."""
    for leftover in path.parent.glob('.gmnet-timm-*'):
        match = _TEMPORARY.fullmatch(leftover.name)
        if match is None or match[4] != path.name or match[2] != _host() or _is_alive(int(match[3])):
            continue
        with contextlib.suppress(OSError):  # another process cleans too
            if match[1] == 'old' and not path.exists():
                leftover.rename(path)
            elif leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _is_alive(pid: int) -> bool:
    if os.name != 'posix':  # there, signal 0 ends a process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
