"""Accuracy of a classifier on raw images, on their low and on their high frequencies."""
import contextlib
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.split import check_radii, split_frequencies

__all__ = ['BandAccuracy', 'SplitOptions', 'evaluate_bands', 'split_parts', 'wilson_interval']

SPACES = ('normalized', 'pixels')


@dataclass(frozen=True)
class SplitOptions:
    """What the paper's definition leaves open. The defaults are its words and nothing more.

    Attributes:
        keep_mean: Leave the mean of each channel in the high part too.
        restore_contrast: Scale each channel of the high part to the standard deviation of the image's.
        space: Whether the split acts on the tensors that enter the model ('normalized') or on pixels before mean and
            standard deviation are taken off ('pixels'). The paper does not say. The low parts are the same. The high
            parts differ by a constant: around the data's mean in the first case, around black in the second.
    """

    keep_mean: bool = False
    restore_contrast: bool = False
    space: str = 'normalized'

    def __post_init__(self):
        if self.space not in SPACES:
            raise UserError(f'The split acts on one of {", ".join(SPACES)}, got {self.space}.')


@dataclass(frozen=True)
class BandAccuracy:
    """How many images of one band were classified correctly."""

    band: str  # 'raw', 'low' or 'high'
    radius: Optional[float]  # cycles per image, None for raw
    correct1: int
    correct5: int
    count: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct1 / self.count

    @property
    def top5(self) -> float:
        """Percent."""
        return 100 * self.correct5 / self.count

    def as_row(self) -> Dict[str, Any]:
        """Numbers and 95 % intervals for a line of a table, in percent."""
        row: Dict[str, Any] = dict(band=self.band, radius='' if self.radius is None else f'{self.radius:g}')
        for k, correct in ((1, self.correct1), (5, self.correct5)):
            low, high = wilson_interval(correct, self.count)
            row[f'top{k}'] = round(100 * correct / self.count, 3)
            row[f'top{k}_low'], row[f'top{k}_high'] = round(100 * low, 3), round(100 * high, 3)
            row[f'correct{k}'] = correct
        row['count'] = self.count
        return row


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> Tuple[float, float]:
    """Wilson's interval of a proportion, 95 % by default: how far another sample of as many images could lie."""
    p = correct / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (p * (1 - p) / count + z * z / (4 * count * count)) ** .5
    return max(0., centre - half), min(1., centre + half)


def split_parts(
        images: torch.Tensor,
        radii: Sequence[float],
        options: SplitOptions = SplitOptions(),
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
) -> Iterator[Tuple[str, Optional[float], torch.Tensor]]:
    """Yield (band, radius, images) of the raw images, then low and high for each radius, as a model takes them.

    Args:
        images: Normalised images (B, C, H, W).
        radii: Radii in cycles per image, each is split on its own.
        options: How to split.
        mean: Mean that was taken off each channel, needed for the space 'pixels'.
        std: Standard deviation that each channel was divided by, needed for the space 'pixels'.
    """
    yield 'raw', None, images
    if options.space == 'normalized':
        offset, scale = images.new_zeros(()), images.new_ones(())
    elif mean is None or std is None:
        raise UserError('To split in the space of pixels, mean and standard deviation of the normalisation are needed.')
    else:
        offset, scale = (images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    for radius in radii:
        parts = split_frequencies(
            images * scale + offset, radius, keep_mean=options.keep_mean, restore_contrast=options.restore_contrast)
        for band, part in zip(('low', 'high'), parts, strict=True):
            yield band, radius, (part - offset) / scale


def evaluate_bands(
        model: nn.Module,
        loader: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        radii: Sequence[float],
        *,
        options: SplitOptions = SplitOptions(),
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
        amp_dtype: Optional[torch.dtype] = None,
        progress: bool = True,
) -> List[BandAccuracy]:
    """Count correct answers on raw images and on both parts of each split, in one pass over the data.

    With an initialised process group each process gives a part of the data, and all get the counts of the whole.

    Args:
        model: A classifier, evaluated on the device and in the mode it is left in: put it into evaluation mode before.
        loader: Batches of normalised images (B, C, H, W) and labels (B,).
        radii: Radii in cycles per image, the order does not matter.
        options: How to split.
        mean: As for `split_parts`.
        std: As for `split_parts`.
        amp_dtype: Type of autocast, None for none.
        progress: Show a bar if the output is a terminal.

    Returns:
        Accuracies of raw, then of low and high for each radius.

    Raises:
        UserError: Radii or data that cannot be used, or labels that the model has no output for.
    """
    from tqdm import tqdm  # comes with huggingface_hub

    for radius in radii:
        check_radii([radius])
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=amp_dtype) if amp_dtype else contextlib.nullcontext()
    bands: List[Tuple[str, Optional[float]]] = [('raw', None)]
    bands += [(band, radius) for radius in radii for band in ('low', 'high')]
    counts = torch.zeros(len(bands), 3, dtype=torch.long, device=device)
    # no bar where the output is not a terminal
    for images, targets in tqdm(loader, desc='bands', unit='batch', leave=False, disable=None if progress else True):
        with torch.inference_mode():  # not around the loader, whose collectives some versions of torch refuse in it
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            for i, (_, _, part) in enumerate(split_parts(images, radii, options, mean, std)):
                with autocast:
                    logits = model(part)
                counts[i] += _count_correct(logits, targets)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    if counts[0, 2] == 0:
        raise UserError('There is no image to evaluate.')
    return [BandAccuracy(band, radius, *row) for (band, radius), row in zip(bands, counts.tolist(), strict=True)]


def _count_correct(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Correct within the first, correct within the first five, all."""
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise UserError(
            f'The data has labels from {int(targets.min())} to {int(targets.max())}, the model has '
            f'{logits.shape[-1]} outputs.')
    ranked = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]
    return torch.stack([ranked[:, 0].sum(), ranked.sum(), ranked.new_tensor(len(targets), dtype=torch.long)])
