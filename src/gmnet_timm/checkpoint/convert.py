"""Converting a checkpoint to another format or precision, without losing what it says about its model."""
from pathlib import Path

import torch

from gmnet_timm.checkpoint.description import ModelDescription
from gmnet_timm.checkpoint.reading import Checkpoint, CheckpointError
from gmnet_timm.checkpoint.writing import save_weights

__all__ = ['cast', 'convert']


def convert(
        checkpoint: Checkpoint,
        description: ModelDescription,
        target: str | Path,
        dtype: torch.dtype | None = None,
        force: bool = False,
) -> dict[str, torch.Tensor]:
    """Write the weights of a checkpoint to another file, in the format that its suffix names, see `save_weights`.

    Args:
        checkpoint: What to write.
        description: The model that it belongs to.
        target: File to write.
        dtype: Floating point type to convert to, that of the checkpoint if None.
        force: Replace an existing target.

    Returns:
        The weights written.

    Raises:
        CheckpointError: The source is not a GmNet, or does not fit into `dtype`.
        UserError: The target exists, or has another suffix.
    """
    if not description.is_gmnet:
        raise CheckpointError(f'{checkpoint.path} holds a {description.name}, which is not a GmNet.')
    state_dict = checkpoint.state_dict
    if dtype is not None:
        state_dict = cast(state_dict, dtype)
    save_weights(state_dict, target, description, force=force)
    return state_dict


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
