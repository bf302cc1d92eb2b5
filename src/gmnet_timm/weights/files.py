"""What does a weights file hold? Torch's zip and legacy formats, safetensors and NumPy: names, tensors and metadata.

The libraries do the reading: `zipfile`, which checks a checksum per entry, `torch.load(weights_only=True)`, `safe_open`
and `numpy.load`. What is added here makes sure that they read what was checked, and all of it.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import io
import math
import pickle
import re
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from timm.models import clean_state_dict

from gmnet_timm.errors import UserError, listed
from gmnet_timm.weights.layouts import strip_wrappers

__all__ = ['SHA256_KEY', 'Checkpoint', 'CheckpointError', 'read_checkpoint', 'read_outline', 'weights_sha256']

SHA256_KEY = 'weights_sha256'  # in the metadata of a safetensors file, which has no checksum of its own

_EMA_KEYS = ('state_dict_ema', 'model_ema')
_RAW_KEYS = ('state_dict', 'model')
_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_EXPANDED = 4 << 30  # bytes of a compressed file of NumPy, expanded


class CheckpointError(UserError, ValueError):
    """A file that is not a usable checkpoint."""


class _DamageError(ValueError):
    """The contents of a file contradict its own format, or cannot be weights."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: The file.
        state_dict: Tensors by parameter name, on the CPU, without the prefixes of wrappers.
        ema: `state_dict` holds EMA weights.
        has_ema: The file holds EMA weights.
        metadata: What the file says besides tensors: `epoch`, `metric`, `arch`, `args` (`argparse.Namespace`) and so on
            of train.py, or the strings in the header of a safetensors file. Entries with tensors are left out. Empty
            for a bare state dict.
        protection: What the values were checked against: 'recorded SHA-256', 'zip checksums', or None if the format
            has no checksum, so that a flipped bit goes unnoticed.
        prefix: Prefix that all names had, such as 'module.', '' for none.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    ema: bool
    has_ema: bool
    metadata: dict[str, Any]
    protection: str | None
    prefix: str = ''

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of train.py, a namespace or (as this package writes it) a dict; empty for other checkpoints."""
        args = self.metadata.get('args')
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        return dict(args) if isinstance(args, dict) else {}


def read_checkpoint(path: str | Path, use_ema: bool = True) -> Checkpoint:
    """Read a checkpoint file. No code that it may carry is run.

    Takes what timm's loader takes: a state dict, bare or under `state_dict_ema`, `model_ema`, `state_dict` or `model`
    (in this order), in torch's zip or legacy format, or a safetensors file, which its suffix tells. Also NumPy: `.npz`
    with an array per tensor, and `.npy` with a pickled dict of arrays.

    Args:
        path: Checkpoint file.
        use_ema: Take EMA weights where there are any.

    Raises:
        CheckpointError: The file is missing, damaged as far as that can be known (checksums, a recorded hash, values
            that are not finite), holds something else, or a pickle that needs code to run.
    """
    path = Path(path)
    with _explained(path):
        content, metadata, protection, records = _read(path)
        key = _weights_key(content, use_ema)
        named = _tensors(content[key] if key else content)
        _check_records(named, records)
        cleaned = strip_wrappers(clean_state_dict(named))
        prefix = next(iter(named)).removesuffix(next(iter(cleaned)))
        _check_values(cleaned, path.stat().st_size)
        if SHA256_KEY in metadata:
            protection = 'recorded SHA-256'
            if metadata[SHA256_KEY] != weights_sha256(cleaned):
                raise _DamageError('Its weights do not have the SHA-256 that it records')
    return Checkpoint(
        path=path, state_dict=cleaned, ema=key in _EMA_KEYS, has_ema=_has_ema(content), metadata=metadata,
        protection=protection, prefix=prefix)


def read_outline(path: str | Path) -> tuple[dict[str, Any], bool]:
    """The `metadata` of a checkpoint file, and whether it holds EMA weights. Tensors are not checked.

    Raises:
        CheckpointError: As by `read_checkpoint`, as far as the metadata are concerned.
    """
    path = Path(path)
    with _explained(path):
        content, metadata, _, _ = _read(path)
    return metadata, _has_ema(content)


def weights_sha256(state_dict: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, independent of the file format.

    Each tensor, in the order of the names, contributes the line `name dtype shape` (`head.bias float32 [1000]`), then
    its values in C order, little-endian.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f'{name} {str(tensor.dtype).split(".")[-1]} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors say which file it is: a damaged one can make the libraries raise almost anything."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for somebody to write
            raise CheckpointError(f'{path} is not a file: give the path of a checkpoint file.')
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError) as e:
        raise CheckpointError(f'No checkpoint at {path}: give the path of a file.') from e
    except Exception as e:
        raise CheckpointError(f'{path} cannot be read as a checkpoint. {_reason(e)}') from e


def _reason(error: Exception) -> str:
    text = ' '.join(str(error).split())[:300]
    if isinstance(error, _DamageError):
        return f'{text}.'
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r'GLOBAL ([\w.]+)', str(error))
        what = f' It asks for {asked[1]}.' if asked else ''
        return f'It is in another format, or a pickle that would run code, which is refused.{what}'
    if isinstance(error, OSError):
        return f'{error.strerror or text}.'
    return f'It is damaged or in another format ({type(error).__name__}: {text.split(". ")[0][:200]}).'


# Size of a record of a zip file, and its CRC-32 where its byte order is this machine's
Records = set[tuple[int, int | None]]


def _read(path: Path) -> tuple[Any, dict[str, Any], str | None, Records | None]:
    """What a file holds, its metadata, what its values were checked against, and the records of torch's zip format."""
    records: Records | None = None
    if path.suffix == '.safetensors':
        return *_read_safetensors(path), None
    with path.open('rb') as file:
        start = file.read(512)
        file.seek(0)
        if start.startswith(b'\x93NUMPY'):
            return _read_npy(file), {}, None, None
        if start.startswith(b'PK'):
            entries = _zip_entries(file)
            if all(name.endswith('.npy') for name in entries):
                arrays = {name.removesuffix('.npy'): np.load(io.BytesIO(data), allow_pickle=False)
                          for name, data in entries.items()}
                return arrays, {}, 'zip checksums', None
            records = _records(entries)
            content, protection = _load_torch(_torch_archive(entries)), 'zip checksums'
        elif start.startswith(b'\x80'):
            content, protection = _load_torch(io.BytesIO(file.read())), None
        elif start[257:262] == b'ustar':
            raise _DamageError('It is a tar file, a format of torch 0.1 that is not read here')
        elif start[8:9] == b'{':
            raise _DamageError('It is not a file of torch.save. The name of a safetensors file has to end in '
                               '.safetensors')
        else:
            raise _DamageError('It is damaged or in another format: no file of torch or NumPy starts like this')
    return content, _metadata(content), protection, records


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Any], str | None]:
    with path.open('rb') as start:
        if start.read(2) == b'PK':
            raise _DamageError('It is in the format of torch.save: let its name end in .pth')
    with safe_open(path, framework='pt') as file:
        names = list(file.keys())
        # copies: the file may change after it was checked
        return {name: file.get_tensor(name).clone() for name in names}, dict(file.metadata() or {}), None


def _zip_entries(file: BinaryIO) -> dict[str, bytes]:
    """The entries of a zip file by name, each checked against its checksum.

    Readers of zip files disagree on files that are damaged in certain ways, so these are refused: a name that occurs
    twice, something before the first entry (a second file, say), an archive comment, entries marked as folders.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = {entry.filename.casefold() for entry in entries}
        if len(names) != len(entries):
            raise _DamageError('Its zip directory lists a name twice')
        if archive.comment or not entries or min(entry.header_offset for entry in entries) != 0:
            raise _DamageError('Its zip directory does not list all that is in it: are these two files in one?')
        if any(entry.is_dir() or entry.external_attr & 0x10 for entry in entries):
            raise _DamageError('A zip entry is marked as a folder')
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed and not all(entry.filename.endswith('.npy') for entry in entries):
            raise _DamageError('A zip entry is compressed, which torch.save never does')
        if sum(entry.file_size for entry in entries) > _MAX_EXPANDED:
            raise _DamageError(f'It expands to more than {_MAX_EXPANDED >> 30} GiB')
        return {entry.filename: archive.read(entry) for entry in entries}


def _torch_archive(entries: dict[str, bytes]) -> BinaryIO:
    """A new archive in memory with nothing but these entries, for torch's own reader."""
    if len({name.partition('/')[0] for name in entries}) != 1:
        raise _DamageError('Its zip entries are not in one folder')
    names = {name.partition('/')[2] for name in entries}
    if 'constants.pkl' in names:
        raise _DamageError('It is a TorchScript archive: save the state dict of the model instead')
    if 'data.pkl' not in names:
        raise _DamageError('It is a zip file without a data.pkl, so not one of torch.save')
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name in list(entries):
            archive.writestr(name, entries.pop(name))  # which frees it
    file.seek(0)
    return file


def _records(entries: dict[str, bytes]) -> Records:
    order = next((data for name, data in entries.items() if name.partition('/')[2] == 'byteorder'), b'')
    native = order in (b'', sys.byteorder.encode())
    return {(len(data), zlib.crc32(data) if native else None) for name, data in entries.items() if '/data/' in name}


def _check_records(tensors: dict[str, torch.Tensor], records: Records | None) -> None:
    """Refuse tensors that are not a whole record each: torch up to 2.8 reads a part of a longer one without a word."""
    if records is None:
        return
    for key, value in {value.untyped_storage().data_ptr(): (key, value) for key, value in tensors.items()}.values():
        storage = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()  # type: ignore[call-overload]
        if not {(len(storage), None), (len(storage), zlib.crc32(storage.data))} & records:
            raise _DamageError(f'The record of {_shown(key)} is not of the size that its tensor has')


def _load_torch(file: BinaryIO) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, map_location='cpu', weights_only=True)
    is_zip = file.getvalue()[:2] == b'PK'  # type: ignore[attr-defined]
    if not is_zip and file.read(1):
        raise _DamageError('It continues after its last tensor: are these two files in one?')
    return content


def _read_npy(file: BinaryIO) -> Any:
    """A dict of arrays, which `numpy.save` pickles."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    if shape != () or not dtype.hasobject:
        raise _DamageError('It holds one array, not arrays by name')
    return _ArrayUnpickler(file).load().item()


class _ArrayUnpickler(pickle.Unpickler):
    """Knows what NumPy's arrays are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = {
            ('multiarray', '_reconstruct'), ('multiarray', 'scalar'), ('numeric', '_frombuffer'),
            ('numpy', 'ndarray'), ('numpy', 'dtype')}
        is_numpy = module == 'numpy' or module.startswith(('numpy.core.', 'numpy._core.'))
        if (module, name) != ('_codecs', 'encode') and not (is_numpy and (module.split('.')[-1], name) in found):
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return super().find_class(module, name)


def _weights_key(content: Any, use_ema: bool) -> str | None:
    """Under which key the weights are, in timm's order. None for a bare state dict."""
    if not isinstance(content, dict):
        return None
    ema = [key for key in _EMA_KEYS if use_ema and content.get(key) is not None]
    return next((key for key in (*ema, *_RAW_KEYS) if key in content), None)


def _has_ema(content: Any) -> bool:
    return _weights_key(content, use_ema=True) in _EMA_KEYS


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    """Plain tensors by name."""
    if not isinstance(content, dict):
        raise _DamageError(f'It holds a {type(content).__name__} instead of tensors by name')
    if not content:
        raise _DamageError('It holds no weights')
    arrays = {key: value for key, value in content.items() if isinstance(value, (np.ndarray, np.generic))}
    strangers = [_shown(key) for key, value in content.items() if not (
        isinstance(key, str) and (key in arrays or isinstance(value, torch.Tensor)))]
    if strangers:
        raise _DamageError(f'It holds no state dict: {listed(strangers)} are not tensors')
    found = {key: _from_numpy(value) if key in arrays else value.detach() for key, value in content.items()}
    unusual = [_shown(key) for key, value in found.items()
               if type(value) is not torch.Tensor or value.layout != torch.strided or value.device.type != 'cpu'
               or value.is_quantized or value.is_complex()]
    if unusual:
        raise _DamageError(f'These are not plain tensors: {listed(unusual)}')
    return found


def _from_numpy(array: Any) -> torch.Tensor:
    array = np.asarray(array)
    if array.dtype.kind not in 'fiu':
        raise _DamageError(f'An array has the type {array.dtype}')
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder('='), order='C'))


def _check_values(state_dict: dict[str, torch.Tensor], file_size: int) -> None:
    """Refuse tensors that a file of this size cannot hold, or that training cannot produce."""
    # A view can be far larger than what it looks at, so this comes before any arithmetic.
    claimed = sum(value.numel() * value.element_size() for value in state_dict.values())
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state_dict.values()}
    if claimed > max(file_size, sum(storages.values())):  # a compressed file is smaller than what it holds
        raise _DamageError(f'Its tensors claim {claimed:,} bytes, but the file has {file_size:,}')
    wrong = [f'{_shown(key)} {value.dtype}' for key, value in state_dict.items() if not (
        value.dtype == torch.int64 if key.endswith('num_batches_tracked') else value.dtype in _FLOAT_DTYPES)]
    if wrong:
        raise _DamageError(f'Not dtypes of weights: {listed(wrong)}')
    # the smallest and the largest value, NaN where any is; unlike `torch.isfinite`, this needs no memory
    extremes = {key: [x.item() for x in torch.aminmax(value)] for key, value in state_dict.items() if value.numel()}
    non_finite = [_shown(key) for key, values in extremes.items() if not all(map(math.isfinite, values))]
    if non_finite:
        raise _DamageError(f'NaN or infinite values in {listed(non_finite)}')
    negative = [_shown(key) for key, (low, _) in extremes.items() if key.endswith('running_var') and low < 0]
    if negative:
        raise _DamageError(f'Negative variances in {listed(negative)}')


def _shown(key: Any) -> str:
    text = str(key)[:100]
    return text if text.isprintable() else ascii(text)


def _metadata(content: Any) -> dict[str, Any]:
    """The entries besides the weights that have no tensors."""
    if _weights_key(content, use_ema=True) is None:
        return {}
    plain = _Plain()
    beside = ((key, value) for key, value in content.items() if key not in (*_EMA_KEYS, *_RAW_KEYS))
    return {key: value for key, value in beside if isinstance(key, str) and plain(value)}


class _Plain:
    """Whether values hold no tensors. Each is looked at once: a pickle can refer to one very often, or to itself."""

    def __init__(self) -> None:
        self.seen: dict[int, bool] = {}

    def __call__(self, value: Any) -> bool:
        if id(value) in self.seen:
            return self.seen[id(value)]
        self.seen[id(value)] = True
        if isinstance(value, argparse.Namespace):  # of which single arguments are left out
            for name in [name for name, item in vars(value).items() if not self(item)]:
                delattr(value, name)
            return True
        if isinstance(value, dict):
            found = all(self(item) for item in value.values())
        elif isinstance(value, (list, tuple, set)):
            found = all(map(self, value))
        else:
            found = not isinstance(value, (torch.Tensor, torch.UntypedStorage, torch.TypedStorage))
        self.seen[id(value)] = found
        return found
