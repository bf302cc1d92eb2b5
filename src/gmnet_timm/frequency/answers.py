"""What a classifier says of the parts of one image, and at which radius its answer changes.

An answer need not change once: it can be lost at one radius and come back at a smaller one. So all radii are looked at.
"""
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.bands import Band, BandSplit, logits_of
from gmnet_timm.frequency.split import largest_radius

__all__ = [
    'Change', 'ScanPoint', 'class_probabilities', 'confidences', 'list_changes', 'scan_radii', 'top_classes',
]


@dataclasses.dataclass(frozen=True)
class ScanPoint:
    """The answer to one part of an image.

    Attributes:
        kind: 'raw', 'low' or 'high'.
        radius: In cycles per image, None for raw.
        answer: The likeliest class.
        confidence: Of this class, 0 to 1.
        kept: Confidence in the answer to the whole image, 0 to 1.
    """

    kind: str
    radius: int | None
    answer: int
    confidence: float
    kept: float

    def as_row(self) -> dict[str, Any]:
        """One row for a CSV."""
        return {**dataclasses.asdict(self), 'radius': '' if self.radius is None else self.radius}


@dataclasses.dataclass(frozen=True)
class Change:
    """Two neighbouring whole radii with different answers, on the way from the whole image to nothing.

    Attributes:
        kind: 'low', where the radius falls from the corner of the spectrum, or 'high', where it rises from 0.
        radius: The first radius with the new answer, in cycles per image.
        before: Class that was the likeliest one until then.
        after: Class that is the likeliest one at this radius.
    """

    kind: str
    radius: int
    before: int
    after: int


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


def scan_radii(
        model: nn.Module,
        split: BandSplit,
        batch_size: int = 8,
) -> Iterator[list[ScanPoint]]:
    """Look at one image without more and more of its frequencies, at every whole radius.

    Low-pass images, from the corner of the spectrum down to 0, and high-pass images, from 0 on, take turns.

    Args:
        model: As for `confidences`.
        split: One image.
        batch_size: Parts per forward pass.

    Yields:
        What one pass has found; the first point of all is the raw image.
    """
    largest = largest_radius(split.images.shape)
    bands = [Band('raw')]
    for radius in range(largest + 1):
        bands += [Band('low', largest - radius), Band('high', radius)]
    answer = None
    for start in range(0, len(bands), batch_size):
        batch = bands[start:start + batch_size]
        found = confidences(model, split, batch)
        if answer is None:
            answer = int(found[0].argmax())
        yield [
            ScanPoint(band.kind, None if band.radius is None else int(band.radius), int(p.argmax()), p.max().item(),
                      p[answer].item())
            for band, p in zip(batch, found, strict=True)
        ]


def list_changes(points: Iterable[ScanPoint], kind: str) -> list[Change]:
    """Every change of the answer, on the way from the whole image to nothing.

    Args:
        points: All that `scan_radii` has found.
        kind: 'low' or 'high'.
    """
    way = [point for point in points if point.kind in ('raw', kind)]  # in this order
    return [
        Change(kind, point.radius, before.answer, point.answer)
        for before, point in itertools.pairwise(way) if point.radius is not None and point.answer != before.answer]
