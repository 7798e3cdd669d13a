"""Each way to grade against its formula written out."""

from math import exp

import pytest

from rewards.grading import grades_from_rewards


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_win_probability_is_the_mean_sigmoid_with_one_half_on_the_diagonal():
    expected = [
        (0.5 + sigmoid(2.0 - 0.5) + sigmoid(2.0 + 1.0)) / 3,
        (sigmoid(0.5 - 2.0) + 0.5 + sigmoid(0.5 + 1.0)) / 3,
        (sigmoid(-1.0 - 2.0) + sigmoid(-1.0 - 0.5) + 0.5) / 3,
    ]
    assert grades_from_rewards([2.0, 0.5, -1.0], "win_probability") == pytest.approx(expected, abs=1e-12)


def test_win_probability_stays_finite_for_huge_rewards():
    assert grades_from_rewards([1e6, -1e6], "win_probability") == [0.75, 0.25]


def test_rank_counts_the_beaten_and_averages_ties():
    # 5 beats three; the two 2s beat one and tie with each other; -1 beats none
    assert grades_from_rewards([2.0, 5.0, 2.0, -1.0], "rank") == [1.5, 3.0, 1.5, 0.0]


def test_quantile_is_the_rank_over_the_others():
    assert grades_from_rewards([2.0, 5.0, 2.0, -1.0], "quantile") == [0.5, 1.0, 0.5, 0.0]


def test_raw_passes_rewards_through():
    assert grades_from_rewards([2, -0.25], "raw") == [2.0, -0.25]


@pytest.mark.parametrize("method", ["win_probability", "rank", "quantile", "raw"])
def test_order_is_kept_and_ties_stay_ties(method):
    grades = grades_from_rewards([0.3, -2.0, 0.3, 7.0], method)
    assert grades[1] < grades[0] == grades[2] < grades[3]


@pytest.mark.parametrize(
    ("method", "grade"), [("win_probability", 0.5), ("rank", 0.0), ("quantile", 0.5), ("raw", 4.0)]
)
def test_a_list_of_one(method, grade):
    assert grades_from_rewards([4.0], method) == [grade]
