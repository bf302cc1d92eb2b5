"""Are these the values that were written, and can they be weights? A SHA-256 of weights, and checks of their values.

safetensors files carry no checksum, so those that this package writes record a hash of their weights. For the checksums
of zip files see `zips`.
"""
import hashlib
import math

import torch

__all__ = ['SHA256_KEY', 'DamageError', 'check_values', 'listed', 'weights_sha256']

SHA256_KEY = 'weights_sha256'  # in the metadata of a safetensors file

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_LISTED = 5  # keys named in an error
_MAX_SHOWN = 100  # characters of each


class DamageError(ValueError):
    """The contents of a file contradict its own format, or cannot be weights."""


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


def check_values(state_dict: dict[str, torch.Tensor], file_size: int) -> None:
    """Check that tensors are ones that a file of this size can hold and that training can produce.

    Raises:
        DamageError: Oversized tensors, wrong dtypes, NaN or infinite values, negative variances.
    """
    # A view can be far larger than what it looks at, so this comes before any arithmetic.
    claimed = sum(value.numel() * value.element_size() for value in state_dict.values())
    if claimed > file_size:
        raise DamageError(f'Its tensors claim {claimed:,} bytes, but the file has {file_size:,}')
    wrong_dtypes = [f'{key} {value.dtype}' for key, value in state_dict.items() if not _is_dtype_of(key, value.dtype)]
    if wrong_dtypes:
        raise DamageError(f'Not dtypes of weights: {listed(wrong_dtypes)}')
    extremes = {key: _extremes(value) for key, value in state_dict.items() if value.numel()}
    non_finite = [key for key, values in extremes.items() if not all(map(math.isfinite, values))]
    if non_finite:
        raise DamageError(f'NaN or infinite values in {listed(non_finite)}')
    negative = [key for key, (low, _) in extremes.items() if key.endswith('running_var') and low < 0]
    if negative:
        raise DamageError(f'Negative variances in {listed(negative)}')


def listed(keys: list[str]) -> str:
    """The first few of many names, on one line, for an error."""
    more = f' and {len(keys) - _MAX_LISTED} more' if len(keys) > _MAX_LISTED else ''
    shown = (key[:_MAX_SHOWN] for key in keys[:_MAX_LISTED])
    return ', '.join(key if key.isprintable() else ascii(key) for key in shown) + more


def _extremes(values: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest value, NaN where any is. Unlike `torch.isfinite`, this needs no memory."""
    low, high = torch.aminmax(values)
    return low.item(), high.item()


def _is_dtype_of(key: str, dtype: torch.dtype) -> bool:
    return dtype == torch.int64 if key.endswith('num_batches_tracked') else dtype in _FLOAT_DTYPES
