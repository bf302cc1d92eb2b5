"""What can be known of damage in a checkpoint: checks before and after reading, and a SHA-256 of the weights.

safetensors files carry no checksum, and torch does not look at the ones of its zip files. So the weights that this
package writes record their own hash, and everything it reads is checked as far as the format allows.
"""
import hashlib
import tarfile
import zipfile
from pathlib import Path
from typing import Dict, List, Optional, Union

import torch
from safetensors import safe_open

__all__ = ['DamageError', 'check_container', 'check_values', 'protection', 'recorded_sha256', 'weights_sha256']

SHA256_KEY = 'weights_sha256'  # in the metadata of a safetensors file

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_LISTED = 5  # keys named in an error


class DamageError(ValueError):
    """The contents of a file contradict its own format, or cannot be weights."""


def weights_sha256(state_dict: Dict[str, torch.Tensor]) -> str:
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


def recorded_sha256(path: Union[str, Path]) -> Optional[str]:
    """The hash that `path` records of its weights, None if it is no safetensors file or records none."""
    if not str(path).endswith('.safetensors'):
        return None
    with safe_open(str(path), framework='pt') as file:
        return (file.metadata() or {}).get(SHA256_KEY)


def protection(path: Union[str, Path]) -> Optional[str]:
    """What `read_state_dict` checks the values in a file against, None if the file has nothing to offer."""
    if recorded_sha256(path) is not None:
        return 'recorded SHA-256'
    return 'zip checksums' if zipfile.is_zipfile(path) else None


def check_container(path: Path) -> None:
    """Check what surrounds the tensors, before anything of it is interpreted.

    Raises:
        DamageError: A zip file whose checksums or sizes are wrong, or a format that torch reads unsafely.
    """
    if tarfile.is_tarfile(path):  # with weights_only=True, torch 2.5 still unpacks these, which later ones refuse
        raise DamageError('It is a tar file, a format of torch 0.1 that is not read here')
    if not zipfile.is_zipfile(path):
        with path.open('rb') as file:
            if file.read(4) == b'PK\x03\x04':
                raise DamageError('It starts like a zip file and does not end like one')
        return
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise DamageError('Its zip entries are compressed, which torch.save never does')
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise DamageError('Its zip entries claim more bytes than the file has')
        damaged = file.testzip()
    if damaged:
        raise DamageError(f'The checksum of {damaged} in it is wrong')


def check_values(state_dict: Dict[str, torch.Tensor], file_size: int) -> None:
    """Check that tensors are ones that a file of this size can hold and that training can produce.

    Raises:
        DamageError: Unusual or oversized tensors, wrong dtypes, NaN or infinite values, negative variances.
    """
    unusual = [key for key, value in state_dict.items() if value.layout != torch.strided or value.device.type != 'cpu']
    if unusual:
        raise DamageError(f'Not plain tensors: {_listed(unusual)}')
    # A view can be far larger than what it looks at, so this comes before any arithmetic.
    claimed = sum(value.numel() * value.element_size() for value in state_dict.values())
    if claimed > file_size:
        raise DamageError(f'Its tensors claim {claimed:,} bytes, the file has {file_size:,}')
    wrong_dtypes = [f'{key} {value.dtype}' for key, value in state_dict.items() if not _is_dtype_of(key, value.dtype)]
    if wrong_dtypes:
        raise DamageError(f'Not dtypes of weights: {_listed(wrong_dtypes)}')
    non_finite = [key for key, value in state_dict.items() if not torch.isfinite(value).all()]
    if non_finite:
        raise DamageError(f'NaN or infinite values in {_listed(non_finite)}')
    negative = [key for key, value in state_dict.items() if key.endswith('running_var') and (value < 0).any()]
    if negative:
        raise DamageError(f'Negative variances in {_listed(negative)}')


def _is_dtype_of(key: str, dtype: torch.dtype) -> bool:
    return dtype == torch.int64 if key.endswith('num_batches_tracked') else dtype in _FLOAT_DTYPES


def _listed(keys: List[str]) -> str:
    more = f' and {len(keys) - _MAX_LISTED} more' if len(keys) > _MAX_LISTED else ''
    return ', '.join(keys[:_MAX_LISTED]) + more
