"""How sure is a comparison of repeated runs? Paired differences, a correction for many of them, power, and intervals.

What it holds:

    paired_difference   mean difference of two variants that share their seeds, with a 95 % interval and a p value: by
                        Student's t, or by bootstrap and random signs, which assume no distribution.
    compare_pairs       the same for a whole family of comparisons, with Holm's correction of its p values.
    holm                the correction alone.
    mean_interval       mean of one variant over seeds, with Student's interval.
    power               chance that the paired t test finds an effect of a given size.
    seeds_needed        number of seeds for a wanted power.
    detectable_effect   smallest effect that a number of seeds finds with a wanted power.
    wilson_interval     interval of a proportion, such as an accuracy over images.

Intervals are for one comparison each, p values after `holm` hold for the family: with probability 95 % none of the
comparisons without a true difference has a corrected p value below 0.05. All tests are two-sided.
"""
import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.extras import require_scipy

__all__ = [
    'Comparison', 'Difference', 'compare_pairs', 'detectable_effect', 'holm', 'mean_interval', 'paired_difference',
    'power', 'seeds_needed', 'wilson_interval',
]

K = TypeVar('K', bound=Hashable)

METHODS = ('t', 'bootstrap')
RESAMPLES = 9999


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of paired differences.

    Attributes:
        mean: Mean of first minus second.
        low: Lower bound of the 95 % interval, NaN for one pair.
        high: Upper bound.
        p: Two-sided p value of no difference, NaN for one pair.
        std: Standard deviation of the differences, as `power` takes it, NaN for one pair.
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
    """One comparison of a family.

    Attributes:
        first: Key of the first variant.
        second: Key of the second, which is subtracted.
        p_holm: p value after Holm's correction over the family.
    """

    first: Hashable
    second: Hashable
    p_holm: float


def paired_difference(first: Sequence[float], second: Sequence[float], method: str = 't') -> Difference:
    """Mean of the differences first - second of values that belong together, such as two variants with the same seed.

    Args:
        first: Values of the first variant.
        second: Values of the second variant in the same order.
        method: 't' is Student's interval and test. 'bootstrap' is the BCa interval of the mean, and a test by random
            signs of the differences, exact up to 13 pairs; with 5 pairs or fewer it cannot give p below 0.05.

    Raises:
        UserError: The numbers of values differ, there are none, one is not finite, or there is no such method.
        MissingExtraError: scipy is not installed.
    """
    if method not in METHODS:
        raise UserError(f'The method must be {" or ".join(METHODS)}, got {method}.')
    if len(first) != len(second):
        raise UserError(f'Paired values come in equal numbers, got {len(first)} and {len(second)}.')
    differences = [a - b for a, b in zip(first, second)]
    mean, low, high = mean_interval(differences)
    count = len(differences)
    if count == 1:
        return Difference(mean, low, high, math.nan, math.nan, count)
    std = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    if max(differences) == min(differences):  # nothing varies: no test is defined, and none is needed at zero
        return Difference(mean, mean, mean, 1. if mean == 0 else 0., 0., count)
    if method == 't':
        p = require_scipy('stats').ttest_1samp(differences, 0.).pvalue
    else:
        low, high, p = _without_distribution(differences)
    return Difference(mean, float(low), float(high), float(p), std, count)


def compare_pairs(
        values: Mapping[K, Mapping[int, float]],
        pairs: Sequence[tuple[K, K]],
        method: str = 't',
) -> list[Comparison]:
    """Paired differences of a family of comparisons, with p values corrected for their number.

    Args:
        values: Value by seed of each variant (and band, step, …: any key).
        pairs: Keys of the two variants of each comparison; the second is subtracted. All of them are one family: give
            every comparison that the text looks at, not only those that turned out well.
        method: As for `paired_difference`.

    Returns:
        One entry per pair, in their order.

    Raises:
        UserError: Two variants have different seeds or fewer than two, and as by `paired_difference`.
    """
    found = []
    for first, second in pairs:
        a, b = values[first], values[second]
        if a.keys() != b.keys() or len(a) < 2:
            raise UserError(
                f'A comparison needs the same seeds, at least two: {first} has {sorted(a)}, {second} has {sorted(b)}.')
        found.append(paired_difference([a[seed] for seed in a], [b[seed] for seed in a], method))
    return [
        Comparison(**dataclasses.asdict(difference), first=first, second=second, p_holm=p)
        for (first, second), difference, p in zip(pairs, found, holm([d.p for d in found]))
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of the p values of one family, in their order.

    Raises:
        UserError: A value is not from 0 to 1.
    """
    wrong = [p for p in p_values if not 0 <= p <= 1]
    if wrong:
        raise UserError(f'p values must be from 0 to 1, got {wrong[0]}.')
    corrected = [0.] * len(p_values)
    largest = 0.
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1., (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def mean_interval(values: Sequence[float], level: float = .95) -> tuple[float, float, float]:
    """Mean of a variant over its seeds, and the bounds of Student's interval, which are NaN for one value.

    Raises:
        UserError: There are no values, or one is not finite.
        MissingExtraError: scipy is not installed.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise UserError(f'Statistics need finite numbers, at least one, got {list(values)}.')
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, math.nan, math.nan
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    half = float(require_scipy('stats').t.ppf((1 + level) / 2, count - 1)) * error
    return mean, mean - half, mean + half


def power(effect: float, std: float, count: int, alpha: float = .05) -> float:
    """Chance that the two-sided paired t test of `count` pairs finds an effect.

    For a family of m comparisons, `alpha` = 0.05 / m is a lower bound of the power after Holm's correction.

    Args:
        effect: True mean difference.
        std: True standard deviation of the differences, as `Difference.std` estimates it.
        count: Number of pairs, at least 2.
        alpha: Significance level.
    """
    if not (std > 0 and count >= 2 and 0 < alpha < 1):
        raise UserError(f'Power needs std > 0, two pairs and 0 < alpha < 1, got {std}, {count}, {alpha}.')
    stats = require_scipy('stats')
    limit = stats.t.ppf(1 - alpha / 2, count - 1)
    # the other side counts too: an effect of zero is found with probability alpha
    shift = abs(effect) / std * math.sqrt(count)
    return float(stats.nct.sf(limit, count - 1, shift) + stats.nct.cdf(-limit, count - 1, shift))


def seeds_needed(effect: float, std: float, alpha: float = .05, wanted: float = .8) -> int:
    """Number of seeds with which the paired t test finds an effect with a wanted power. Arguments as for `power`.

    Raises:
        UserError: More than 10,000 are needed.
    """
    low, high = 1, 2
    while power(effect, std, high, alpha) < wanted:
        low, high = high, 2 * high
        if high > 20_000:
            raise UserError(f'An effect of {effect:g} with std {std:g} needs more than 10,000 seeds.')
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(effect, std, middle, alpha) < wanted else (low, middle)
    return high


def detectable_effect(std: float, count: int, alpha: float = .05, wanted: float = .8) -> float:
    """Smallest effect that `count` seeds find with a wanted power. Arguments as for `power`."""
    largest = 1.
    while power(largest * std, std, count, alpha) < wanted:
        largest *= 2
    return std * float(require_scipy('optimize').brentq(
        lambda effect: power(effect * std, std, count, alpha) - wanted, 0., largest))


def wilson_interval(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a proportion: 95 % of such intervals contain the true proportion.

    The images count as a random sample. The result of a second sample of the same size lies in the interval of the
    first less often, in 83 % of cases, since both vary.

    Args:
        correct: Number of successes.
        count: Number of trials.
        z: Quantile of the normal distribution, by default for 95 %.

    Returns:
        Lower and upper bound, from 0 to 1.
    """
    p = correct / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (p * (1 - p) / count + z * z / (4 * count * count)) ** .5
    return max(0., centre - half), min(1., centre + half)


def _without_distribution(differences: list[float]) -> tuple[float, float, float]:
    """Bounds of the BCa bootstrap interval of the mean, and the p value of random signs. The same at every call."""
    import numpy as np  # comes with scipy
    stats = require_scipy('stats')
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(0)).confidence_interval
    signs = stats.permutation_test(
        (differences,), np.mean, permutation_type='samples', n_resamples=RESAMPLES, rng=np.random.default_rng(0))
    return interval.low, interval.high, signs.pvalue
