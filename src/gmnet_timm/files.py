"""Writing files and folders whole or not at all, and saying where it failed.

What is written goes to a temporary file or folder beside its target first, and takes its place at the end. An error or
Ctrl-C removes it. What `kill -9` leaves behind is hidden, and named `.gmnet-timm-…`.
"""
import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from gmnet_timm.errors import TargetExistsError, UserError

__all__ = ['replacing', 'replacing_folder', 'write_text', 'writing']

_PREFIX = '.gmnet-timm-'
_OLD = '.old'


@contextlib.contextmanager
def replacing(path: str | Path, force: bool = True) -> Iterator[Path]:
    """A temporary file that takes the place of `path` at the end of the block, and vanishes if the block raises.

    It has the name of `path`, in another folder. Folders on the way are created. A symbolic link stays, and the file
    that it points to is replaced. What is not a regular file, such as a device, a pipe or a folder, never is.

    Raises:
        TargetExistsError: `path` exists and `force` is not set.
        UserError: It is not a regular file, or cannot be written.
    """
    path = Path(path)
    with writing(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise UserError(f'{path} is not a regular file, and is left alone: choose another name.')
        if target.exists() and not force:
            raise TargetExistsError(path)
        with _temporary_folder(target.parent) as folder:
            yield folder / target.name
            os.replace(folder / target.name, target)


@contextlib.contextmanager
def replacing_folder(path: str | Path, force: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes `path` at the end of the block, and vanishes if the block raises.

    It is empty at first. If `path` exists, it is moved away before the new folder takes its place, which takes along
    what it does not have itself. A symbolic link stays, and the folder that it points to is replaced.

    Raises:
        TargetExistsError: `path` exists and `force` is not set.
        UserError: It is not a folder, or cannot be written.
    """
    path = Path(path)
    with writing(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_dir():
            raise UserError(f'{path} is not a folder, and is left alone: choose another name.')
        if target.exists() and not force:
            raise TargetExistsError(path)
        with _temporary_folder(target.parent) as folder:
            new = folder / target.name
            new.mkdir()
            yield new
            if target.exists():
                _take_along(target, new)
                os.rename(target, folder / _OLD)
            try:
                os.rename(new, target)
            except BaseException:
                if (folder / _OLD).exists():
                    os.rename(folder / _OLD, target)
                raise


def write_text(path: str | Path, text: str, force: bool = True) -> None:
    """Write a text file; arguments and errors as for `replacing`."""
    with replacing(path, force=force) as temporary:
        temporary.write_text(text, encoding='utf-8', newline='')


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn failures while writing into an error that names the file. torch reports a full disk as RuntimeError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as e:
        full = isinstance(e, OSError) and e.errno == errno.ENOSPC or _is_full(path)
        reason = 'the disk is full' if full else getattr(e, 'strerror', None) or str(e)
        raise UserError(f'Cannot write {path}: {reason}.') from e


def _is_full(path: Path) -> bool:
    """Whether a disk with room for files has none left; /proc and its like never have any."""
    for existing in (path, *path.absolute().parents):
        with contextlib.suppress(OSError, ValueError):  # not there, or not a path at all
            usage = shutil.disk_usage(existing)
            return usage.total > 0 and usage.free < 1_000_000
    return False


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private, and what is moved out of it keeps its mode
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # which this process made


def _take_along(source: Path, target: Path) -> None:
    """Give a folder what only another one has, by hard links where possible."""
    def there(folder: str, names: list[str]) -> set[str]:
        mine = target / Path(folder).relative_to(source)
        return {name for name in names if os.path.lexists(mine / name) and not (mine / name).is_dir()}

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new, follow_symlinks=False)
        except OSError:
            shutil.copy2(old, new, follow_symlinks=False)

    shutil.copytree(source, target, symlinks=True, ignore=there, copy_function=link, dirs_exist_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
