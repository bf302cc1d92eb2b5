"""Reading a checkpoint file: its weights, and what it says beside them."""
import argparse
import dataclasses
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models import load_state_dict

from gmnet_timm.checkpoint.integrity import (
    DamageError,
    check_container,
    check_values,
    protection,
    recorded_sha256,
    weights_sha256,
)
from gmnet_timm.errors import UserError

__all__ = ['Checkpoint', 'CheckpointError', 'read_checkpoint', 'read_metadata']


class CheckpointError(UserError, ValueError):
    """A file that is not a usable checkpoint."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights of a file and what it says beside them."""

    path: Path
    state_dict: dict[str, torch.Tensor]
    ema: bool  # state_dict holds EMA weights
    has_ema: bool  # the file holds EMA weights
    metadata: dict[str, Any]
    protection: str | None

    @property
    def args(self) -> dict[str, Any]:
        """Arguments of train.py, {} if the file has none."""
        args = self.metadata.get('args')
        return dict(args if isinstance(args, dict) else getattr(args, '__dict__', {}))


def read_checkpoint(path: str | Path, use_ema: bool = True) -> Checkpoint:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'No checkpoint at {path}: give the path of a file.')
    try:
        check_container(path)
        state_dict = load_state_dict(str(path), use_ema=use_ema, device='cpu', weights_only=True)
        metadata = read_metadata(path)
    except Exception as e:  # a damaged file can make the unpickler and the zip reader raise almost anything
        raise CheckpointError(f'{path} cannot be read as a checkpoint. {_reason(e)}') from e
    if not state_dict:
        raise CheckpointError(f'{path} holds no weights.')
    strangers = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise CheckpointError(f'{path} holds no state dict: {", ".join(strangers[:5])} are no tensors.')
    try:
        check_values(state_dict, path.stat().st_size)
    except DamageError as e:
        raise CheckpointError(f'{path} holds no usable weights. {e}.') from e
    recorded = recorded_sha256(path)
    if recorded is not None and recorded != weights_sha256(state_dict):
        raise CheckpointError(f'{path} is damaged: its weights do not have the SHA-256 that it records.')
    has_ema = any(metadata.get(key) is not None for key in ('state_dict_ema', 'model_ema'))
    return Checkpoint(path, state_dict, has_ema and use_ema, has_ema, metadata, protection(path))


def read_metadata(path: str | Path) -> dict[str, Any]:
    if str(path).endswith('.safetensors'):
        with safe_open(str(path), framework='pt') as file:
            return dict(file.metadata() or {})
    with torch.serialization.safe_globals([argparse.Namespace]):
        entries = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(entries, dict):
        return {}
    return {key: value for key, value in entries.items() if not isinstance(value, torch.Tensor)}


def _reason(error: Exception) -> str:
    text = ' '.join(str(error).split())
    if 'weights_only' in text or 'Weights only' in text:
        blocked = re.search(r'Unsupported globals: (.*?)\. No automatic', text)  # timm's message, where it knows them
        names = f' It asks for {blocked.group(1)[:200]}.' if blocked else ''
        return f'It is in another format, or a pickle that would run code, which is refused.{names}'
    if isinstance(error, DamageError):
        return f'{error}.'
    return f'It is damaged or in another format ({type(error).__name__}: {text.split(". ")[0][:200]}).'
