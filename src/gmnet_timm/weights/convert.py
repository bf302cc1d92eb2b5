"""Writing weights, in another format or precision too: read back before they take their place."""
import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing
from gmnet_timm.weights.description import ModelDescription
from gmnet_timm.weights.files import SHA256_KEY, CheckpointError, read_checkpoint, weights_sha256

__all__ = ['SUFFIXES', 'cast', 'save_weights']

SUFFIXES = ('.safetensors', '.pth.tar', '.pth', '.pt', '.bin')


def cast(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Convert the floating point tensors of a state dict.

    Raises:
        CheckpointError: A value is too large for `dtype`.
    """
    converted = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state_dict.items()}
    overflown = [key for key, value in converted.items() if not torch.isfinite(value).all()]
    if overflown:
        raise CheckpointError(f'{overflown[0]} has values too large for {dtype}: use bfloat16 or float32.')
    return converted


def save_weights(
        state_dict: dict[str, torch.Tensor],
        path: str | Path,
        description: ModelDescription,
        force: bool = False,
) -> str:
    """Write weights in the format that the suffix of `path` names.

    `.safetensors` records the description and a SHA-256 of the weights in its metadata; `.pth.tar` has the weights
    under `state_dict` and the description under `args`, as train.py writes them; `.pth`, `.pt` and `.bin` hold the bare
    state dict, which says nothing of the model.

    Args:
        state_dict: Tensors by parameter name.
        path: File to write. It is read back before it takes the place of an existing one.
        description: The model that the weights belong to.
        force: Replace an existing file.

    Returns:
        SHA-256 of the weights, as of `weights_sha256`.

    Raises:
        FileExistsError: `path` exists and `force` is not set.
        UserError: Its suffix is unknown, or it cannot be written.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise UserError(f'{path.name} names no format: end it in one of {", ".join(SUFFIXES)}.')
    # safetensors takes no tensors that share memory
    state_dict = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state_dict.items()}
    sha256 = weights_sha256(state_dict)
    with replacing(path, force=force) as temporary:
        if path.suffix == '.safetensors':
            temporary.write_bytes(_safetensors(state_dict, sha256, description))
        elif path.suffix == '.tar':
            torch.save({'state_dict': state_dict, 'arch': description.size, 'args': _as_train_args(description)},
                       temporary)
        else:
            torch.save(state_dict, temporary)
        again = read_checkpoint(temporary)  # which compares a recorded SHA-256 with the tensors
        if sha256 != (again.metadata.get(SHA256_KEY) or weights_sha256(again.state_dict)):
            raise UserError(f'{path} was not written: what was read back differs. Check the disk.')
    return sha256


def _as_train_args(description: ModelDescription) -> dict[str, Any]:
    """The arguments with which train.py would build the model, as a dict that `torch.load` reads by default."""
    args = description.full_args
    return dict(
        model=description.size,
        num_classes=args['num_classes'],
        in_chans=args['in_chans'],
        gp=args['global_pool'],
        model_kwargs={key: value for key, value in description.distinct_args.items()
                      if key not in ('in_chans', 'global_pool')},
    )


def _safetensors(state_dict: dict[str, torch.Tensor], sha256: str, description: ModelDescription) -> bytes:
    """A safetensors file with hash and description in its metadata.

    The library writes metadata in random order: the same weights would be a new file, and a new commit, each time.
    """
    raw = save(state_dict)
    start = 8 + struct.unpack('<Q', raw[:8])[0]
    # transformers asks for the format
    metadata = {'format': 'pt', SHA256_KEY: sha256, **description.as_metadata()}
    header = json.dumps({'__metadata__': metadata, **json.loads(raw[8:start])}, separators=(',', ':')).encode()
    header += b' ' * (-len(header) % 8)  # keeps the tensors aligned
    return struct.pack('<Q', len(header)) + header + raw[start:]
