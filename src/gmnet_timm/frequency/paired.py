"""Two classifiers on the same images: the images that only one of them gets right decide, not two accuracies."""
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from gmnet_timm.errors import UserError, require
from gmnet_timm.frequency.bands import BandAccuracy

__all__ = ['PairedDifference', 'compare_bands', 'paired_difference']


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Top-1 of a model minus that of a baseline on the same images.

    Attributes:
        only_model: Images that only the model classifies correctly.
        only_baseline: Images that only the baseline does.
        count: Number of images.
    """

    only_model: int
    only_baseline: int
    count: int

    @property
    def difference(self) -> float:
        """In percentage points."""
        return 100 * (self.only_model - self.only_baseline) / self.count

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test, two-sided: how likely the two numbers are so far apart by chance."""
        stats = require('scipy.stats', 'freq')
        discordant = self.only_model + self.only_baseline
        return float(stats.binomtest(self.only_model, discordant).pvalue) if discordant else 1.

    def interval(self) -> tuple[float, float]:
        """Bounds of the 95 % interval of the difference in percentage points (adjusted Wald, Bonett & Price 2012)."""
        model, baseline = ((n + 1) / (self.count + 2) for n in (self.only_model, self.only_baseline))
        centre = model - baseline
        half = 1.959964 * math.sqrt((model + baseline - centre ** 2) / (self.count + 2))
        return 100 * max(-1., centre - half), 100 * min(1., centre + half)

    def as_row(self) -> dict[str, Any]:
        """For a CSV."""
        low, high = self.interval()
        return dict(
            difference=round(self.difference, 3), difference_low=round(low, 3), difference_high=round(high, 3),
            only_model=self.only_model, only_baseline=self.only_baseline, count=self.count, p_value=self.p_value)


def paired_difference(model: torch.Tensor, baseline: torch.Tensor) -> PairedDifference:
    """Compare answers to the same images in the same order, each (images,), True where the answer is right.

    Raises:
        UserError: They are not of the same number of images.
    """
    if model.shape != baseline.shape or not len(model):
        raise UserError(f'{len(model)} and {len(baseline)} answers are not to the same images, and cannot be paired.')
    return PairedDifference(int((model & ~baseline).sum()), int((baseline & ~model).sum()), len(model))


def compare_bands(model: Sequence[BandAccuracy], baseline: Sequence[BandAccuracy]) -> list[PairedDifference]:
    """One comparison per band of two results of `evaluate_bands` on the same data with the same radii."""
    if [found.band for found in model] != [found.band for found in baseline]:
        raise UserError('The two were evaluated on different bands.')
    return [paired_difference(one.answers, other.answers) for one, other in zip(model, baseline, strict=True)]
