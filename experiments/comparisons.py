"""Comparisons of repeated runs: paired differences, Holm's correction, power. By scipy and statsmodels.

Intervals are for one comparison each. p values after Holm's correction hold for the family: with probability 95 % none
of the comparisons without a true difference has a corrected p value below 0.05. All tests are two-sided.
"""
import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.intervals import student_interval

__all__ = [
    'Comparison', 'Difference', 'compare_pairs', 'detectable_effect', 'equivalence', 'holm', 'mean_interval',
    'paired_difference',
]

K = TypeVar('K', bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of paired differences, first minus second.

    Attributes:
        mean: The mean.
        low: Lower bound of Student's 95 % interval, NaN for one pair.
        high: Upper bound.
        p: Two-sided p value of no difference by Student's t, NaN for one pair.
        std: Standard deviation of the differences, NaN for one pair.
        count: Number of pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    std: float
    count: int


@dataclasses.dataclass(frozen=True)
class Comparison(Difference):
    """One comparison of a family: keys of first and second, and the p value after Holm's correction."""

    first: Hashable
    second: Hashable
    p_holm: float


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds, and the bounds of Student's interval, which are NaN for one value.

    Raises:
        UserError: There are no values, or one is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise UserError(f'Statistics need finite numbers, at least one, got {list(values)}.')
    return student_interval(values)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean of the differences of values that belong together, such as two variants with the same seed.

    Raises:
        UserError: The numbers of values differ, there are none, or one is not finite.
    """
    if len(first) != len(second):
        raise UserError(f'Paired values come in equal numbers, got {len(first)} and {len(second)}.')
    differences = [a - b for a, b in zip(first, second)]
    mean, low, high = mean_interval(differences)
    if len(differences) == 1:
        return Difference(mean, low, high, math.nan, math.nan, 1)
    std = float(np.std(differences, ddof=1))
    if std == 0:  # nothing varies: no test is defined, and none is needed at zero
        return Difference(mean, mean, mean, 1. if mean == 0 else 0., 0., len(differences))
    return Difference(mean, low, high, float(stats.ttest_1samp(differences, 0.).pvalue), std, len(differences))


def compare_pairs(values: Mapping[K, Mapping[int, float]], pairs: Sequence[tuple[K, K]]) -> list[Comparison]:
    """Paired differences of a family of comparisons, with p values corrected for their number.

    Args:
        values: Value by seed of each variant (and band, step, …: any key).
        pairs: Keys of the two variants of each comparison; the second is subtracted. All of them are one family: give
            every comparison that the text looks at, not only those that turned out well.

    Raises:
        UserError: Two variants have different seeds or fewer than two, and as by `paired_difference`.
    """
    found = []
    for first, second in pairs:
        a, b = values[first], values[second]
        if a.keys() != b.keys() or len(a) < 2:
            raise UserError(
                f'A comparison needs the same seeds, at least two: {first} has {sorted(a)}, {second} has {sorted(b)}.')
        found.append(paired_difference([a[seed] for seed in a], [b[seed] for seed in a]))
    return [
        Comparison(**dataclasses.asdict(difference), first=first, second=second, p_holm=p)
        for (first, second), difference, p in zip(pairs, found, holm([d.p for d in found]))
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of the p values of one family, in their order."""
    return multipletests(p_values, method='holm')[1].tolist() if len(p_values) else []


def equivalence(difference: Difference, bound: float) -> float:
    """p value of two one-sided t tests: small where the true difference lies within ±`bound`."""
    error = difference.std / math.sqrt(difference.count)
    upper, lower = ((side * difference.mean - bound) / error for side in (1, -1))
    return float(max(stats.t.cdf(upper, difference.count - 1), stats.t.cdf(lower, difference.count - 1)))


def detectable_effect(std: float, count: int, alpha: float = .05) -> float:
    """Smallest true mean difference that the two-sided paired t test of `count` pairs finds with a power of 80 %.

    For a family of m comparisons, `alpha` = 0.05 / m is that of the first step of Holm's correction.
    """
    return std * float(TTestPower().solve_power(nobs=count, alpha=alpha, power=.8))
