"""Writing weights: in another format or precision, whole or not at all, and never over something else unasked."""
import json
import struct
from pathlib import Path
from typing import Dict, Optional, Union

import torch
from safetensors.torch import save

from gmnet_timm.checkpoint.architecture import infer_architecture
from gmnet_timm.checkpoint.integrity import SHA256_KEY, weights_sha256
from gmnet_timm.checkpoint.reading import CheckpointError, read_checkpoint
from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing

__all__ = ['cast', 'convert', 'save_weights']

SUFFIXES = ('.safetensors', '.pth.tar', '.pth', '.pt', '.bin')


def convert(
        source: Union[str, Path],
        target: Union[str, Path],
        dtype: Optional[torch.dtype] = None,
        use_ema: bool = False,
        force: bool = False,
) -> Dict[str, torch.Tensor]:
    """Write the weights of a checkpoint file to another file, in the format that its suffix names.

    `.safetensors` records a SHA-256 of the weights; `.pth.tar` is laid out as by the authors and timm's train.py, with
    the weights under `state_dict`; `.pth`, `.pt` and `.bin` hold the bare state dict.

    Args:
        source: Any checkpoint that `read_checkpoint` reads.
        target: File to write.
        dtype: Floating point type to convert to, that of the source if None.
        use_ema: Take the averaged weights.
        force: Replace an existing target.

    Returns:
        The weights written.

    Raises:
        CheckpointError: The source is no GmNet, damaged, has no averaged weights, or does not fit into `dtype`.
        UserError: The target exists, or has another suffix.
    """
    checkpoint = read_checkpoint(source, use_ema=use_ema)
    if use_ema and not checkpoint.ema:
        raise CheckpointError(f'{source} has no averaged (EMA) weights.')
    state_dict = checkpoint.state_dict
    infer_architecture(state_dict)
    if dtype is not None:
        state_dict = cast(state_dict, dtype)
    save_weights(state_dict, target, force=force)
    return state_dict


def cast(state_dict: Dict[str, torch.Tensor], dtype: torch.dtype) -> Dict[str, torch.Tensor]:
    """Convert the floating point tensors of a state dict.

    Raises:
        CheckpointError: A value is too large for `dtype`.
    """
    converted = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state_dict.items()}
    overflown = [key for key, value in converted.items() if not torch.isfinite(value).all()]
    if overflown:
        raise CheckpointError(f'{overflown[0]} has values too large for {dtype}: use bfloat16 or float32.')
    return converted


def save_weights(state_dict: Dict[str, torch.Tensor], path: Union[str, Path], force: bool = False) -> None:
    """Write a state dict in the format that the suffix of `path` names, see `convert`.

    It is read back before it takes the place of `path`.

    Raises:
        UserError: `path` exists and `force` is not set, or its suffix is unknown.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise UserError(f'{path.name} names no format: end it in one of {", ".join(SUFFIXES)}.')
    # safetensors takes no tensors that share memory
    state_dict = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state_dict.items()}
    with replacing(path, force=force) as temporary:
        if path.suffix == '.safetensors':
            temporary.write_bytes(_safetensors(state_dict))
        else:
            torch.save({'state_dict': state_dict} if path.suffix == '.tar' else state_dict, temporary)
        if weights_sha256(read_checkpoint(temporary).state_dict) != weights_sha256(state_dict):
            raise UserError(f'{path} was not written: what was read back differs. Is the disk sound?')


def _safetensors(state_dict: Dict[str, torch.Tensor]) -> bytes:
    """A safetensors file with the hash in its metadata.

    The library writes metadata in random order: the same weights would be a new file, and a new commit, each time.
    """
    raw = save(state_dict)
    start = 8 + struct.unpack('<Q', raw[:8])[0]
    metadata = {'format': 'pt', SHA256_KEY: weights_sha256(state_dict)}  # transformers asks for the format
    header = json.dumps({'__metadata__': metadata, **json.loads(raw[8:start])}, separators=(',', ':')).encode()
    header += b' ' * (-len(header) % 8)  # keeps the tensors aligned
    return struct.pack('<Q', len(header)) + header + raw[start:]
