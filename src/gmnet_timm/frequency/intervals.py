"""Intervals of proportions, such as accuracies over images."""

__all__ = ['wilson_interval']


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
