"""What does a checkpoint file hold? The one place where such files are read: torch's, train.py's and safetensors.

A file is read once, into memory, and everything is taken from there: what was checked is what is loaded. Its pickle is
read as data (see `pickles`), so nothing in a file can run code or take more memory than its size warrants.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import os
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from timm.models import clean_state_dict

from gmnet_timm.checkpoint.integrity import SHA256_KEY, DamageError, check_values, listed, weights_sha256
from gmnet_timm.checkpoint.pickles import ForeignPickleError, Storage, StoredTensor, Unread, unpickle
from gmnet_timm.checkpoint.zips import MAGIC as ZIP_MAGIC
from gmnet_timm.checkpoint.zips import Read, check_crc, zip_records
from gmnet_timm.errors import UserError

__all__ = ['Checkpoint', 'CheckpointError', 'holds_ema', 'read_checkpoint', 'read_metadata']

_EMA_KEYS = ('state_dict_ema', 'model_ema')
_RAW_KEYS = ('state_dict', 'model')

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_MAX_PICKLE = 32 << 20  # bytes; a training checkpoint with ten thousand tensors has three million
_MAX_HEADER = 4 << 20  # bytes of a safetensors header
_MAX_TENSORS = 50_000  # each takes a kilobyte besides its values
_MAX_VALUES, _MAX_DEPTH = 1_000_000, 50  # of metadata


class CheckpointError(UserError, ValueError):
    """A file that is not a usable checkpoint."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: The file.
        state_dict: Tensors by parameter name, on the CPU, without the `module.` prefix of DistributedDataParallel.
        ema: `state_dict` holds EMA weights.
        has_ema: The file holds EMA weights.
        metadata: What the file says besides tensors: `epoch`, `metric`, `arch`, `args` (`argparse.Namespace`) and so on
            of train.py, or the strings in the header of a safetensors file. Entries with tensors are left out. Empty
            for a bare state dict.
        protection: What the values were checked against: 'recorded SHA-256', 'zip checksums', or None if the format
            has no checksum, so that a flipped bit goes unnoticed.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    ema: bool
    has_ema: bool
    metadata: dict[str, Any]
    protection: str | None

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of train.py, a namespace or (as this package writes it) a dict; empty for other checkpoints."""
        args = self.metadata.get('args')
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        return dict(args) if isinstance(args, dict) else {}


@dataclasses.dataclass(frozen=True)
class _TorchFile:
    """What the pickle of a torch file says, and where its tensors lie."""

    content: Any
    extents: dict[str, tuple[int, int]]  # start and size in the file, by storage
    byteorder: str
    protection: str | None


def read_checkpoint(path: str | Path, use_ema: bool = True) -> Checkpoint:
    """Read a checkpoint file. No code that it may carry is run.

    Takes what timm's loader takes: a state dict, bare or under `state_dict_ema`, `model_ema`, `state_dict` or `model`
    (in this order), with or without the `module.` prefix of DistributedDataParallel, in torch's zip or legacy format;
    or a safetensors file, which its suffix tells. In memory, it takes at most twice the size of the file and 256 MB.

    Args:
        path: Checkpoint file.
        use_ema: Take EMA weights where there are any.

    Raises:
        CheckpointError: The file is missing, damaged as far as that can be known (checksums, a recorded hash, values
            that are not finite), holds something else, or a pickle that needs code to run.
    """
    path = Path(path)
    with _opened(path) as (file, size):
        read_weights = _read_safetensors if path.name.endswith('.safetensors') else _read_torch
        checkpoint = read_weights(path, file, size, use_ema)
        _check_weights(checkpoint, size)
    return checkpoint


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The `metadata` of a checkpoint file, without reading its tensors where the format allows that (all but legacy).

    Raises:
        CheckpointError: As by `read_checkpoint`, as far as the metadata are concerned: tensors are not checked.
    """
    return _outline(Path(path))[0]


def holds_ema(path: str | Path) -> bool:
    """Whether a checkpoint file holds EMA weights, without reading its tensors, see `read_metadata`.

    Raises:
        CheckpointError: As by `read_metadata`.
    """
    return _outline(Path(path))[1]


def _outline(path: Path) -> tuple[dict[str, Any], bool]:
    with _opened(path) as (file, size):
        read = _reader(file, size)
        if path.name.endswith('.safetensors'):
            return _safetensors_metadata(read), False
        content = _parse_torch(read, size, check_tensors=False).content
        return _metadata(content), _has_ema(content)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file to read and its size. Errors say which file it is: a damaged one can raise almost anything."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for somebody to write
            raise CheckpointError(f'{path} is not a file: give the path of a checkpoint file.')
        with path.open('rb') as file:
            yield file, os.fstat(file.fileno()).st_size
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError) as e:
        raise CheckpointError(f'No checkpoint at {path}: give the path of a file.') from e
    except Exception as e:
        raise CheckpointError(f'{path} cannot be read as a checkpoint. {_reason(e)}') from e


def _reason(error: Exception) -> str:
    text = ' '.join(str(error).split())[:300]
    if isinstance(error, ForeignPickleError):
        return f'It is in another format, or a pickle that would run code, which is refused. {text}.'
    if isinstance(error, DamageError):
        return f'{text}.'
    if isinstance(error, OSError):
        return f'{error.strerror or text}.'
    return f'It is damaged or in another format ({type(error).__name__}: {text.split(". ")[0][:200]}).'


def _reader(file: BinaryIO, size: int) -> Read:
    def read(start: int, length: int) -> memoryview:
        _check_extent(start, length, size)
        file.seek(start)
        return memoryview(_exactly(file.read(length), length))
    return read


def _buffer_reader(buffer: memoryview) -> Read:
    def read(start: int, length: int) -> memoryview:
        _check_extent(start, length, len(buffer))
        return buffer[start:start + length]
    return read


def _check_extent(start: int, length: int, size: int) -> None:
    if not 0 <= start <= start + length <= size:
        raise DamageError('It is cut off')


def _exactly(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise DamageError('It changed while it was read: try again')
    return data


def _read_safetensors(path: Path, file: BinaryIO, size: int, use_ema: bool) -> Checkpoint:
    raw = _exactly(file.read(size), size)
    metadata = _safetensors_metadata(_buffer_reader(memoryview(raw)))
    state_dict = clean_state_dict(safetensors.torch.load(raw))
    protection = 'recorded SHA-256' if SHA256_KEY in metadata else None
    return Checkpoint(path, state_dict, ema=False, has_ema=False, metadata=metadata, protection=protection)


def _safetensors_metadata(read: Read) -> dict[str, Any]:
    if bytes(read(0, 4)) == ZIP_MAGIC:
        raise DamageError('It is in the format of torch.save: let its name end in .pth')
    (length,) = struct.unpack('<Q', read(0, 8))
    if length > _MAX_HEADER:
        raise DamageError(f'Its header claims {length:,} bytes')
    header = json.loads(bytes(read(8, length)))
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise DamageError('Its header does not list tensors by name')
    metadata = header.get('__metadata__', {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamageError('The metadata in its header are not strings')
    return metadata


def _read_torch(path: Path, file: BinaryIO, size: int, use_ema: bool) -> Checkpoint:
    raw = torch.empty(size, dtype=torch.uint8)
    buffer = raw.numpy().data
    if file.readinto(buffer) != size:  # type: ignore[attr-defined]
        raise DamageError('It changed while it was read: try again')
    parsed = _parse_torch(_buffer_reader(buffer), size)
    content = parsed.content
    key = _weights_key(content, use_ema)
    described = content[key] if key else content
    if not isinstance(described, dict):
        raise DamageError(f'It holds {_kind(described)} instead of tensors by name')
    _check_described(path, described)
    return Checkpoint(
        path,
        state_dict=clean_state_dict(_load_tensors(described, parsed, raw)),
        ema=key in _EMA_KEYS,
        has_ema=_has_ema(content),
        metadata=_metadata(content),
        protection=parsed.protection,
    )


def _weights_key(content: Any, use_ema: bool) -> str | None:
    """Under which key the weights are, in timm's order. None for a bare state dict."""
    if not isinstance(content, dict):
        return None
    ema = [key for key in _EMA_KEYS if use_ema and content.get(key) is not None]
    return next((key for key in (*ema, *_RAW_KEYS) if key in content), None)


def _has_ema(content: Any) -> bool:
    return _weights_key(content, use_ema=True) in _EMA_KEYS


def _check_described(path: Path, described: dict[Any, Any]) -> None:
    if not described:
        raise CheckpointError(f'{path} holds no weights.')
    strangers = [str(key) for key, value in described.items()
                 if not (isinstance(key, str) and isinstance(value, (StoredTensor, Unread)))]
    if strangers:
        raise CheckpointError(f'{path} holds no state dict: {listed(strangers)} are not tensors.')
    unusual = [key for key, value in described.items() if isinstance(value, Unread)]
    if unusual:
        raise CheckpointError(f'{path} holds no usable weights. Not plain tensors: {listed(unusual)}.')
    if len(described) > _MAX_TENSORS:
        raise CheckpointError(f'{path} holds {len(described):,} tensors, more than any model.')


def _load_tensors(
        described: dict[str, StoredTensor],
        parsed: _TorchFile,
        raw: torch.Tensor,
) -> dict[str, torch.Tensor]:
    storages: dict[str, torch.Tensor] = {}  # their bytes; tensors that share one share memory, as by torch
    tensors: dict[int, torch.Tensor] = {}
    for value in described.values():
        stored = value.storage
        if stored.key not in storages:
            start, size = parsed.extents[stored.key]
            storages[stored.key] = raw[start:start + size].clone()
            if parsed.byteorder != sys.byteorder:
                storages[stored.key].untyped_storage().byteswap(stored.dtype)
        if id(value) not in tensors:
            values = storages[stored.key][stored.start:stored.start + stored.nbytes].view(value.dtype)
            tensors[id(value)] = values.as_strided(value.size, value.stride, values.storage_offset() + value.offset)
    return {key: tensors[id(value)] for key, value in described.items()}


def _check_weights(checkpoint: Checkpoint, size: int) -> None:
    path = checkpoint.path
    if not checkpoint.state_dict:
        raise CheckpointError(f'{path} holds no weights.')
    try:
        check_values(checkpoint.state_dict, size)
    except DamageError as e:
        raise CheckpointError(f'{path} holds no usable weights. {e}.') from e
    if checkpoint.protection == 'recorded SHA-256' \
            and checkpoint.metadata[SHA256_KEY] != weights_sha256(checkpoint.state_dict):
        raise CheckpointError(f'{path} is damaged: its weights do not have the SHA-256 that it records.')


def _parse_torch(read: Read, size: int, check_tensors: bool = True) -> _TorchFile:
    start = bytes(read(0, min(size, 512)))
    if start.startswith(ZIP_MAGIC):
        return _parse_zip(read, size, check_tensors)
    if start.startswith(b'\x80'):
        return _parse_legacy(read, size)
    if start[257:262] == b'ustar':
        raise DamageError('It is a tar file, a format of torch 0.1 that is not read here')
    if start[8:9] == b'{':
        raise DamageError('It is not a file of torch.save. The name of a safetensors file has to end in .safetensors')
    raise DamageError('It is damaged or in another format: no file of torch starts like this')


def _parse_zip(read: Read, size: int, check_tensors: bool) -> _TorchFile:
    named = zip_records(read, size)
    folders = {name.partition('/')[0] for name in named}
    if len(folders) != 1:
        raise DamageError('Its zip entries are not in one folder')
    records = {name.partition('/')[2]: record for name, record in named.items()}
    if 'constants.pkl' in records:
        raise DamageError('It is a TorchScript archive: save the state dict of the model instead')
    if 'data.pkl' not in records:
        raise DamageError('It is a zip file without a data.pkl, so not one of torch.save')
    for name in records if check_tensors else {'data.pkl', 'byteorder'} & records.keys():
        check_crc(read, name, records[name])
    byteorder = 'little'
    if 'byteorder' in records:
        byteorder = bytes(read(records['byteorder'].start, records['byteorder'].size)).decode()
    if byteorder not in ('little', 'big'):
        raise DamageError(f'Its byte order is {byteorder[:20]!r}')
    storages: dict[str, Storage] = {}
    pickled = records['data.pkl']
    if pickled.size > _MAX_PICKLE:
        raise DamageError(f'Its pickle has {pickled.size:,} bytes, more than those of checkpoints')
    content = unpickle(io.BytesIO(read(pickled.start, pickled.size)), storages)
    extents = {}
    for key, storage in storages.items():
        record = records.get(f'data/{key}')
        if record is None or record.size != storage.stored_nbytes:
            raise DamageError(f'The size of its record data/{key[:100]} is not what its pickle says')
        extents[key] = record.start, record.size
    return _TorchFile(content, extents, byteorder, 'zip checksums')


def _parse_legacy(read: Read, size: int) -> _TorchFile:
    """The format of torch before 1.6: five pickles, then each storage with the number of its elements."""
    stream = io.BytesIO(read(0, min(size, _MAX_PICKLE)))
    if unpickle(stream) != _LEGACY_MAGIC or unpickle(stream) != _LEGACY_VERSION:
        raise ForeignPickleError('It is a pickle, but not one of torch.save')
    unpickle(stream)  # sizes of types where it was written
    storages: dict[str, Storage] = {}
    content, keys = unpickle(stream, storages), unpickle(stream)
    if not isinstance(keys, list) or len(keys) != len(storages) or set(keys) != storages.keys():
        raise DamageError('It does not list the tensors that it has')
    extents = {}
    position = stream.tell()
    for key in keys:
        (count,) = struct.unpack('<q', read(position, 8))
        nbytes = storages[key].stored_nbytes
        if count * storages[key].dtype.itemsize != nbytes:
            raise DamageError('The size of one of its tensors is not what its pickle says')
        _check_extent(position + 8, nbytes, size)
        extents[key] = position + 8, nbytes
        position += 8 + nbytes
    if position != size:
        raise DamageError('It continues after its last tensor: are these two files in one?')
    return _TorchFile(content, extents, 'little', None)


def _metadata(content: Any) -> dict[str, Any]:
    """The entries besides the weights that have no tensors."""
    if _weights_key(content, use_ema=True) is None:
        return {}
    plain = _Plain()
    beside = ((key, value) for key, value in content.items() if key not in (*_EMA_KEYS, *_RAW_KEYS))
    return {key: value for key, value in beside if isinstance(key, str) and plain(value)}


class _Plain:
    """Whether values are plain all through. Bounded, as a pickle can refer to one value very often, or to itself."""

    def __init__(self) -> None:
        self.left = _MAX_VALUES

    def __call__(self, value: Any, depth: int = 0) -> bool:
        self.left -= 1
        if self.left < 0 or depth > _MAX_DEPTH:
            raise DamageError('What it says besides the tensors is too much, or nested too deeply')
        if isinstance(value, argparse.Namespace):  # of which single arguments are left out
            for name in [name for name, item in vars(value).items() if not self(item, depth + 1)]:
                delattr(value, name)
            return True
        if isinstance(value, (dict, list, tuple)):
            return all(self(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value))
        return not isinstance(value, (Storage, StoredTensor, Unread))


def _kind(value: Any) -> str:
    return 'a tensor' if isinstance(value, StoredTensor) else f'a {type(value).__name__}'
