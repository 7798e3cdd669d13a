"""Intervals, agreement, ratings and curves, each against a formula or a second implementation."""

import itertools
import math
from statistics import fmean

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from align.bench.judges import simulated
from align.judging.agreement import agreements, kappa
from align.judging.best_of_n import best_of_n
from align.judging.diversity import distinct, repetition
from align.judging.intervals import interval, of_standard_error, t_quantile
from align.judging.ratings import log_strengths, ranking


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 9, 30, 1000])
def test_student_t_is_scipys(freedom):
    assert t_quantile(0.975, freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=0.01)


@pytest.mark.parametrize("count", [8, 40])
def test_an_interval_is_scipys_bootstrap_at_expanded_percentiles(count):
    values = np.random.default_rng(0).beta(2, 1, count)
    found = interval(values, seed=1, draws=40_000)
    tail = scipy.stats.norm.cdf(-math.sqrt(count / (count - 1)) * scipy.stats.t.ppf(0.975, count - 1))
    options = {"method": "percentile", "n_resamples": 40_000, "rng": np.random.default_rng(2)}
    own = scipy.stats.bootstrap((values,), np.mean, confidence_level=1 - 2 * tail, **options).confidence_interval
    assert (found.low, found.high) == pytest.approx((own.low, own.high), abs=3e-3)
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(scipy.stats.sem(values))
    assert found == interval(values, seed=1, draws=40_000) != interval(values, seed=3, draws=40_000)


def test_prompts_that_all_say_the_same_leave_room_for_others():
    """20 wins of 20: Clopper and Pearson's lower bound; all ties may hide as many wins as losses."""
    won = interval([1.0] * 20, seed=0, bounds=(0, 1))
    exact = scipy.stats.binomtest(20, 20).proportion_ci(0.95)
    assert (won.low, won.high) == pytest.approx((exact.low, exact.high))
    tied = interval([0.5] * 20, seed=0, bounds=(0, 1))
    assert tied.high - 0.5 == pytest.approx(0.5 - tied.low) == pytest.approx(0.5 * (1 - exact.low))


def test_95_of_100_intervals_hold_the_truth():
    """300 evaluations of 50 prompts with four samples each: within three standard errors of 95 %."""
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        wins = generator.random((50, 4)) < generator.beta(1.4, 0.6, (50, 1))
        found = interval(wins.mean(1).tolist(), seed=trial, bounds=(0, 1), draws=500)
        held += found.low <= 0.7 <= found.high
    assert 0.95 - 0.038 < held / 300 < 0.95 + 0.038


@pytest.mark.long
def test_the_benchmark_finds_93_to_97_of_100():
    rows = [row for row in simulated() if (row["prompts"], row["truth"]) != (20, 0.9)]
    assert len(rows) == 18 and all(0.93 <= row["coverage"] <= 0.97 for row in rows)


def test_one_prompt_has_no_interval():
    assert (interval([0.3], seed=0).low, of_standard_error(0.3, 0.1, 1).high) == (None, None)


def test_an_interval_of_a_standard_error_is_students():
    found = of_standard_error(0.9, 0.1, 12, bounds=(0, 1))
    assert found.low == pytest.approx(0.9 - scipy.stats.t.ppf(0.975, 11) * 0.1, rel=1e-3)
    assert found.high == 1


@pytest.mark.parametrize("rewards", [[3.0], [1.0, 4.0, 2.0], [0.5, 0.5, -1.0, 7.0, 2.0]])
def test_the_best_of_n_is_the_mean_over_all_choices_of_n(rewards):
    expected = [fmean(max(own) for own in itertools.combinations(rewards, n)) for n in range(1, len(rewards) + 1)]
    assert best_of_n(rewards) == pytest.approx(expected)


def test_distinct_and_repetition_of_texts_by_hand():
    assert distinct(["a b a", "A c"], 1) == 3 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3
    assert distinct(["a"], 2) is None
    assert repetition(["a b c d a b c d", "x"]) == pytest.approx((1 / 5) / 2)  # abcd bcda cdab dabc abcd


def test_kappa_of_a_textbook_table():
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: (0.7 - 0.5) / (1 - 0.5)."""
    first, second = [1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa([1, 0, -1], [1, 0, -1]) == 1
    assert kappa([1, 1], [1, 1]) is None
    (own,) = agreements({"a": first, "b": second})
    assert own == {"judges": ["a", "b"], "kappa": pytest.approx(0.4), "same": 0.7}


def test_strengths_are_the_likeliest():
    """Against scipy's minimiser of the Bradley-Terry likelihood, with the half wins on top."""
    wins = np.array([[0, 7.5, 9], [2.5, 0, 4], [1, 6, 0]])

    def loss(s):
        gap = s[:, None] - s[None]
        return ((wins + 0.5) * np.logaddexp(0, -gap) * (1 - np.eye(3))).sum()

    found = scipy.optimize.minimize(loss, np.zeros(3), tol=1e-12).x
    assert log_strengths(wins) == pytest.approx(found - found.mean(), abs=1e-4)


def test_a_ranking_has_the_better_first_and_holds_the_truth():
    """Models of known strength: 191 Elo points are odds of three to one."""
    generator, truth = np.random.default_rng(0), np.array([0.0, math.log(3), -math.log(3)])
    chance = 1 / (1 + np.exp(truth[None] - truth[:, None]))
    won = (generator.random((400, 3, 3)) < chance) * np.triu(np.ones((3, 3)), 1)
    wins = won + (1 - won).swapaxes(1, 2) * np.tril(np.ones((3, 3)), -1)
    found = ranking(["middle", "good", "bad"], wins, seed=0)
    assert [row["model"] for row in found] == ["good", "middle", "bad"]
    for row, elo in zip(found, (1000 + 400 * math.log10(3), 1000, 1000 - 400 * math.log10(3)), strict=True):
        assert row["low"] < elo < row["high"] and row["low"] < row["elo"] < row["high"]
    always = ranking(["a", "b"], np.tile([[0.0, 1.0], [0.0, 0.0]], (30, 1, 1)), seed=0)
    assert always[0]["model"] == "a" and math.isfinite(always[0]["elo"])
