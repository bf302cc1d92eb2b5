"""Statistics against scipy, published tables and simulation."""
import math

import numpy as np
import pytest
from scipy import stats

from experiments import comparisons as statistics
from gmnet_timm.errors import UserError

SLEEP = {  # Student's own data of 1908: additional hours of sleep by two drugs, ten patients each
    'first': [.7, -1.6, -.2, -1.2, -.1, 3.4, 3.7, .8, 0., 2.],
    'second': [1.9, .8, 1.1, .1, -.1, 4.4, 5.5, 1.6, 4.6, 3.4],
}


def test_paired_t_gives_what_is_printed_for_students_data():
    """t = -4.0621 with 9 degrees of freedom, p = 0.002833, interval -2.4599 to -0.7001: R's t.test(paired = TRUE)."""
    found = statistics.paired_difference(SLEEP['first'], SLEEP['second'])
    assert (found.mean, found.low, found.high) == pytest.approx((-1.58, -2.4598858, -.7001142), abs=1e-6)
    assert found.p == pytest.approx(.002833, abs=1e-6) and found.count == 10
    assert found.mean / found.std * math.sqrt(10) == pytest.approx(-4.0621, abs=1e-4)


def test_paired_t_equals_scipy():
    rng = np.random.default_rng(0)
    for count in (2, 5, 30):
        a, b = rng.normal(size=(2, count))
        expected = stats.ttest_rel(a, b)
        interval = expected.confidence_interval()
        found = statistics.paired_difference(list(a), list(b))
        assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))


def test_differences_that_do_not_vary():
    assert statistics.paired_difference([1., 2.], [1., 2.]) == statistics.Difference(0., 0., 0., 1., 0., 2)
    assert statistics.paired_difference([2., 3.], [1., 2.]).p == 0
    one = statistics.paired_difference([2.], [1.])
    assert one.mean == 1 and all(math.isnan(x) for x in (one.low, one.high, one.p, one.std))


def test_errors():
    with pytest.raises(UserError, match='2 and 1'):
        statistics.paired_difference([1., 2.], [1.])
    with pytest.raises(UserError, match='finite'):
        statistics.paired_difference([1., math.nan], [1., 2.])
    with pytest.raises(UserError, match='at least one'):
        statistics.paired_difference([], [])
    with pytest.raises(UserError, match='same seeds'):
        statistics.compare_pairs({'a': {0: 1., 1: 2.}, 'b': {0: 1., 2: 2.}}, [('a', 'b')])


def test_holm_gives_what_r_gives():
    """p.adjust(c(0.01, 0.04, 0.03, 0.005, 0.2), 'holm') of R."""
    assert statistics.holm([.01, .04, .03, .005, .2]) == pytest.approx([.04, .09, .09, .025, .2])
    assert statistics.holm([.6, .7]) == [1., 1.] and statistics.holm([]) == []


def test_comparisons_are_paired_by_seed_and_corrected():
    values = {
        'a': dict(zip(range(10), SLEEP['first'])),
        'b': dict(reversed(list(zip(range(10), SLEEP['second'])))),  # another order of the same seeds
        'c': dict(zip(range(10), np.random.default_rng(0).normal(size=10))),
    }
    ab, ac = statistics.compare_pairs(values, [('a', 'b'), ('a', 'c')])
    assert (ab.first, ab.second, ab.count) == ('a', 'b', 10) and ab.p == pytest.approx(.002833, abs=1e-6)
    assert [ab.p_holm, ac.p_holm] == statistics.holm([ab.p, ac.p]) and ab.p_holm == pytest.approx(2 * ab.p)


@pytest.mark.parametrize('effect, count', [(.2, 199), (.5, 34), (.8, 15), (1., 10)])
def test_detectable_effects_as_in_published_tables(effect, count):
    """Pairs for a power of 80 % at 5 %, two-sided, by Cohen's d of the differences, as G*Power prints them."""
    assert statistics.detectable_effect(1., count) <= effect < statistics.detectable_effect(1., count - 1)


def test_mean_interval_is_students():
    values = [40., 42., 47., 51., 39.]
    low, high = stats.t.interval(.95, 4, np.mean(values), stats.sem(values))
    assert statistics.mean_interval(values) == pytest.approx((np.mean(values), low, high))


def test_equivalence_is_two_one_sided_tests():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0., 1., (2, 12))
    found = statistics.paired_difference(list(a), list(b))
    upper = stats.ttest_1samp(a - b, 2., alternative='less').pvalue
    lower = stats.ttest_1samp(a - b, -2., alternative='greater').pvalue
    assert statistics.equivalence(found, 2.) == pytest.approx(max(upper, lower))
