"""Writing files whole or not at all, and saying where it failed."""
import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError

from gmnet_timm.errors import UserError

__all__ = ['replacing', 'write_text', 'writing']


@contextlib.contextmanager
def replacing(path: str | Path, force: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place at the end of the block, and vanishes if the block raises.

    Folders on the way are created.

    Raises:
        UserError: `path` exists and `force` is not set, is a device, pipe or folder, or cannot be written.
    """
    path = Path(path)
    # os.path's functions answer False where Path's raise, for a name that is too long
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path} is not a regular file and is not replaced: choose another name.')
    if os.path.exists(path) and not force:
        raise UserError(f'{path} exists: choose another name, or give --force to replace it.')
    temporary = path.with_name(f'.{secrets.token_hex(4)}-{path.name}')
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # mostly, that it is not there
            temporary.unlink()


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
