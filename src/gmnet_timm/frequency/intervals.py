"""Intervals of accuracies and of means: over images, and over trainings."""
import math
import statistics
from collections.abc import Sequence

import torch

from gmnet_timm.errors import require

__all__ = ['normal_interval', 'student_interval', 'wilson_interval']


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a proportion: 95 % of such intervals contain the true proportion.

    The images count as a random sample.

    Args:
        correct: Number of successes.
        count: Number of trials.

    Returns:
        Lower and upper bound, from 0 to 1.
    """
    p, z = correct / count, 1.959964
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (p * (1 - p) / count + z * z / (4 * count * count)) ** .5
    return max(0., centre - half), min(1., centre + half)


def student_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a quantity over trainings, and the bounds of Student's 95 % interval, NaN for one training."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, math.nan, math.nan
    t = require('scipy.stats', 'freq').t
    half = float(t.ppf(.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def normal_interval(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean over images of values (images, …), and the bounds of its normal 95 % interval, NaN for one image."""
    mean = values.mean(0)
    half = 1.959964 * values.std(0) / len(values) ** .5 if len(values) > 1 else torch.full_like(mean, math.nan)
    return mean, mean - half, mean + half
