"""What a classifier says of the parts of one image."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.bands import Band, BandSplit, logits_of

__all__ = ['class_probabilities', 'confidences', 'top_classes']


def confidences(model: nn.Module, split: BandSplit, bands: Sequence[Band]) -> torch.Tensor:
    """Probabilities of a classifier for bands of one image, (bands, classes), in one batch.

    Args:
        model: A classifier, on the device of the image and in the mode it is left in.
        split: One image.
        bands: Which of its frequencies to keep.

    Raises:
        UserError: The model is not a classifier, or its logits are NaN or infinite.
    """
    with torch.inference_mode():
        return class_probabilities(model(torch.cat([split(band) for band in bands])))


def class_probabilities(output: Any) -> torch.Tensor:
    """Probabilities (B, classes) from what a classifier returns: a softmax, for one class a sigmoid.

    Raises:
        UserError: It is not a classifier, or its logits are NaN or infinite.
    """
    logits = logits_of(output).float()
    if not logits.isfinite().all():
        raise UserError('The logits are NaN or infinite: the weights are damaged or have diverged.')
    return logits.softmax(-1) if logits.shape[-1] > 1 else logits.sigmoid()


def top_classes(confidence: torch.Tensor, count: int, names: Sequence[str] = ()) -> list[tuple[str, float]]:
    """The likeliest classes of (classes,) with their confidences, likeliest first; numbers where there are no names."""
    order = confidence.argsort(descending=True)[:count].tolist()
    return [(names[i] if names else f'class {i}', confidence[i].item()) for i in order]
