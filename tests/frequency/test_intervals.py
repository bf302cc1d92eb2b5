"""Intervals of proportions against scipy."""
import pytest

from gmnet_timm.frequency.intervals import wilson_interval


def test_wilson_interval_equals_scipy():
    stats = pytest.importorskip('scipy.stats')
    for correct, count in [(0, 10), (3, 10), (10, 10), (790, 1000), (1, 1)]:
        expected = stats.binomtest(correct, count).proportion_ci(method='wilson')
        assert wilson_interval(correct, count) == pytest.approx((expected.low, expected.high), abs=1e-6)
