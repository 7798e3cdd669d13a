"""Intervals against scipy's."""

import numpy as np
import pytest
from scipy import stats

from align.studies.statistics import interval, paired, t_quantile


@pytest.mark.parametrize("freedom", [*range(1, 31), 101, 1000])
def test_quantiles_are_students(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_an_interval_is_students_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 7).tolist()
    low, high = stats.t.interval(0.95, 6, loc=np.mean(values), scale=stats.sem(values))
    found = interval(values)
    assert [found[key] for key in ("mean", "low", "high", "sd")] == pytest.approx(
        [np.mean(values), low, high, np.std(values, ddof=1)]
    )
    assert found["n"] == 7


def test_a_single_value_has_no_interval():
    assert interval([2.0]) == {"mean": 2.0, "low": None, "high": None, "sd": None, "n": 1}


def test_pairs_are_of_one_seed_and_take_out_what_it_does_to_both():
    values, baseline = {0: 1.0, 1: 5.0, 2: 9.5, 7: 100.0}, {2: 9.0, 1: 4.0, 0: 0.5, 8: -100.0}
    expected = stats.ttest_rel([1.0, 5.0, 9.5], [0.5, 4.0, 9.0]).confidence_interval(0.95)
    found = paired(values, baseline)
    assert found and (found["low"], found["high"]) == pytest.approx((expected.low, expected.high)) and found["n"] == 3
    assert paired({1: 1.0}, {2: 1.0}) is None
