"""Writing files and folders whole or not at all, and saying where it failed.

What is written goes to a private folder beside its target first, `.gmnet-timm-XXXXXXXX`, which the writing process
keeps locked. What a killed process left behind is not locked: the next one that writes beside it removes it.
"""
import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from gmnet_timm.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where leftovers stay
    fcntl = None  # type: ignore[assignment]

__all__ = ['replacing', 'replacing_folder', 'write_text', 'writing']

_PREFIX = '.gmnet-timm-'
_LOCK, _NEW, _OLD = 'lock', 'new', 'old'


@contextlib.contextmanager
def replacing(path: str | Path, force: bool = True) -> Iterator[Path]:
    """A temporary file that takes the place of `path` at the end of the block, and vanishes if the block raises.

    It has the name of `path`, in another folder. Folders on the way are created. A symbolic link stays, and the file
    that it points to is replaced. What is not a regular file, such as a device, a pipe or a folder, never is.

    Raises:
        UserError: `path` exists and `force` is not set, it is not a regular file, or it cannot be written.
    """
    path = Path(path)
    with writing(path):
        target = _resolve(path)
        _check_target(path, target, force, stat.S_ISREG, 'a regular file')
        with _workspace(target.parent) as work:
            temporary = work / _NEW / target.name
            yield temporary
            os.replace(temporary, target)


@contextlib.contextmanager
def replacing_folder(path: str | Path, force: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes `path` at the end of the block, and vanishes if the block raises.

    It is empty at first. `path` is at no moment part old and part new: if it exists, it is moved away before the new
    one takes its place, and what the new one does not have is taken along. A process that is killed between these two
    moves leaves no `path`, and the next one that writes beside it puts the old one back. A symbolic link stays, and the
    folder that it points to is replaced.

    Raises:
        UserError: `path` exists and `force` is not set, it is not a folder, or it cannot be written.
    """
    path = Path(path)
    with writing(path):
        target = _resolve(path)
        with _workspace(target.parent) as work:  # which may put back what a killed process moved away
            _check_target(path, target, force, stat.S_ISDIR, 'a folder')
            temporary = work / _NEW / target.name
            temporary.mkdir()
            yield temporary
            _check_target(path, target, force, stat.S_ISDIR, 'a folder')
            if target.exists():
                _take_along(target, temporary)
                os.rename(target, work / _OLD / target.name)
            os.rename(temporary, target)


def write_text(path: str | Path, text: str, force: bool = True) -> None:
    """Write a text file; arguments and errors as for `replacing`."""
    with replacing(path, force=force) as temporary:
        temporary.write_text(text, encoding='utf-8', newline='')


@contextlib.contextmanager
def writing(path: Path, hint: str = '') -> Iterator[None]:
    """Turn failures while writing into an error that names the file. torch reports a full disk as RuntimeError.

    Args:
        path: What is written.
        hint: What the user can do then.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        if isinstance(e, UserError):
            raise
        free = _free_megabytes(path)
        full = getattr(e, 'errno', None) == errno.ENOSPC or free < 1
        reason = 'the disk is full' if full else getattr(e, 'strerror', None) or str(e)
        raise UserError(f'Cannot write {path}: {reason} ({free:,.0f} MB free).{hint}') from e


def _free_megabytes(path: Path) -> float:
    for existing in (path, *path.absolute().parents):
        with contextlib.suppress(OSError, ValueError):  # not there, or not a path at all
            return shutil.disk_usage(existing).free / 1e6
    return float('nan')


def _resolve(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except ValueError as e:
        raise UserError(f'{str(path)!r} cannot be the name of a file: {e}.') from e


def _check_target(path: Path, target: Path, force: bool, is_right: Callable[[int], bool], what: str) -> None:
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return
    if not is_right(mode):
        raise UserError(f'{path} is not {what}, and is left alone: choose another name.')
    if not force:
        raise UserError(f'{path} exists: choose another name, or give --force to replace it.')


@contextlib.contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A private folder in `parent`, with folders for what is new and old. Leftovers of dead processes are removed."""
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # one may write in a folder that one may not list
        for leftover in list(parent.glob(f'{_PREFIX}*')):
            with contextlib.suppress(OSError):  # somebody else's, or removed by another process in this moment
                _remove_leftover(leftover)
    work, lock = _locked_folder(parent)
    try:
        for name in (_NEW, _OLD):
            (work / name).mkdir()
        yield work
    finally:
        _put_back(work)
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        work = parent / f'{_PREFIX}{secrets.token_hex(4)}'
        work.mkdir()
        with contextlib.suppress(FileNotFoundError):  # taken for a leftover before it was locked
            lock = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks, where leftovers stay
                    fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.exists(work / _LOCK):
                return work, lock
            os.close(lock)


def _remove_leftover(work: Path) -> None:
    """Remove the private folder of another process, unless that is alive."""
    if fcntl is None or work.is_symlink():
        return
    try:
        lock = os.open(work / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        os.rmdir(work)  # killed before it could lock it: it is empty, or this fails
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _put_back(work)
        shutil.rmtree(work)
    finally:
        os.close(lock)


def _put_back(work: Path) -> None:
    """Undo a replacement that was interrupted between its two moves."""
    for old in (work / _OLD).glob('*'):
        if not os.path.lexists(work.parent / old.name):
            os.rename(old, work.parent / old.name)


def _take_along(source: Path, target: Path) -> None:
    """Give a folder what only another one has, by hard links where possible."""
    for entry in source.iterdir():
        mine = target / entry.name
        if os.path.lexists(mine):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, mine, symlinks=True, copy_function=_link)
        else:
            _link(entry, mine)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
