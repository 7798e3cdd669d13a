"""Ranking metrics against scipy, against enumeration of all orders of tied scores, and against loops over pairs."""

from itertools import combinations, permutations
from math import isnan, log2
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from align.losses.ranking import ndcg, ranking_metrics

LISTS = st.lists(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 3)), min_size=1, max_size=5), min_size=1, max_size=6
)
"""Lists of (score, grade) from few values, so that ties are common."""


def padded(lists, width=6):
    """Scores, grades and mask, right-padded with NaN."""
    pad = [(float("nan"), float("nan"))]
    values = torch.tensor([[*row, *pad * (width - len(row))] for row in lists], dtype=torch.float64)
    return values[..., 0], values[..., 1], ~values[..., 0].isnan()


def dcg(grades, k):
    return sum((2**g - 1) / log2(rank + 1) for rank, g in enumerate(grades, start=1) if rank <= k)


def expected_ndcg(row, k):
    """The mean of NDCG over every order that sorts the scores."""
    orders = [o for o in permutations(row) if all(a[0] >= b[0] for a, b in zip(o, o[1:], strict=False))]
    ideal = dcg(sorted((g for _, g in row), reverse=True), k)
    return mean(dcg([g for _, g in o], k) for o in orders) / ideal


def expected_pair_accuracy(row):
    pairs = [(a, b) if a[1] > b[1] else (b, a) for a, b in combinations(row, 2) if a[1] != b[1]]
    return mean(1.0 if better[0] > worse[0] else 0.5 if better[0] == worse[0] else 0.0 for better, worse in pairs)


def expected_top1(row):
    firsts = [g for s, g in row if s == max(s for s, _ in row)]
    return mean(float(g == max(g for _, g in row)) for g in firsts)


def expected_margin(row):
    best, worst = max(g for _, g in row), min(g for _, g in row)
    return mean(s for s, g in row if g == best) - mean(s for s, g in row if g == worst)


def orderable(row):
    return len({g for _, g in row}) > 1


@settings(max_examples=60, deadline=None)
@given(LISTS, st.sampled_from([None, 1, 2, 3]))
def test_is_what_loops_and_enumeration_give(lists, k):
    metrics = ranking_metrics(*padded(lists), k=k)
    for index, row in enumerate(lists):
        if not orderable(row):
            assert all(isnan(values[index]) for values in metrics.values())
            continue
        expected = {
            "pair_accuracy": expected_pair_accuracy(row),
            "ndcg": expected_ndcg(row, k or len(row)),
            "top1_agreement": expected_top1(row),
            "margin": expected_margin(row),
        }
        for name, value in expected.items():
            assert metrics[name][index].item() == pytest.approx(value), name


@settings(max_examples=60, deadline=None)
@given(LISTS)
def test_kendall_tau_is_scipys_tau_b(lists):
    kendalltau = pytest.importorskip("scipy.stats").kendalltau
    tau = ranking_metrics(*padded(lists))["kendall_tau"]
    for index, row in enumerate(lists):
        if orderable(row):
            scores, grades = zip(*row, strict=True)
            expected = 0.0 if len(set(scores)) == 1 else kendalltau(scores, grades).statistic
            assert tau[index].item() == pytest.approx(expected, abs=1e-12)


def test_before_the_first_step_all_scores_are_tied_and_nothing_is_claimed():
    metrics = ranking_metrics(*padded([[(0, 3), (0, 1), (0, 0)]]))
    discount = (1 / log2(2) + 1 / log2(3) + 1 / log2(4)) / 3
    expected = {
        "pair_accuracy": 0.5,
        "ndcg": (7 + 1 + 0) * discount / (7 / log2(2) + 1 / log2(3)),
        "kendall_tau": 0.0,
        "top1_agreement": 1 / 3,
        "margin": 0.0,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


def test_the_order_of_the_row_does_not_matter():
    scores, grades = torch.randint(0, 3, (50, 6)).float(), torch.randint(0, 3, (50, 6)).float()
    order = torch.rand(50, 6).argsort(dim=1)
    mask = torch.rand(50, 6) < 0.8
    moved = ranking_metrics(scores.gather(1, order), grades.gather(1, order), mask.gather(1, order))
    for name, values in ranking_metrics(scores, grades, mask).items():
        assert_close(moved[name], values, equal_nan=True)


@pytest.mark.parametrize("score", [-9.0, 9.0])
@pytest.mark.parametrize("grade", [-9.0, 9.0])
def test_what_padding_holds_does_not_matter(score, grade):
    lists = [[(1, 2), (0, 1), (0, 3)], [(2, 1), (1, 0)], [(-1, -1), (0, 2), (1, 1), (2, 0), (2, 3)]]
    scores, grades, mask = padded(lists)
    filled = ranking_metrics(scores.where(mask, score), grades.where(mask, grade), mask)
    for name, values in ranking_metrics(scores, grades, mask).items():
        assert_close(filled[name], values)


def test_a_list_without_padding_keeps_its_gains():
    """Only grades below 0 are shifted: the gains of 3, 2, 1 are 7, 3, 1."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    value = ndcg(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]]), mask)
    assert_close(value, torch.tensor([(1 + 3 / log2(3) + 7 / log2(4)) / (7 + 3 / log2(3) + 1 / log2(4))]))


def test_raw_rewards_neither_overflow_nor_go_below_zero():
    """Grades of hundreds and negative grades: gains are counted from the lowest grade and relative to the highest."""
    scores, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    huge = ndcg(scores, torch.tensor([[900.0, 899.0, 0.0]]), mask)
    assert_close(huge, torch.tensor([(0.5 / log2(3) + 1 / log2(4)) / (1 + 0.5 / log2(3))]))
    below_zero = ndcg(scores, torch.tensor([[-1.0, -2.0, -3.0]]), mask)
    assert_close(below_zero, torch.tensor([(1 / log2(3) + 3 / log2(4)) / (3 + 1 / log2(3))]))


def test_a_list_without_completions_is_nothing_to_order():
    metrics = ranking_metrics(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert all(values.isnan().all() for values in metrics.values())


def test_differences_of_rounding_size_are_ties():
    """Before the first step all log-ratios are zero but for rounding, which must not rank anything."""
    grades, real = torch.tensor([[2.0, 1.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    noise = torch.tensor([[3e-7, -2e-7, 1e-7]])
    for name, value in ranking_metrics(noise, grades, real).items():
        if name != "margin":
            assert torch.equal(value, ranking_metrics(torch.zeros(1, 3), grades, real)[name]), name
    assert not torch.equal(
        ranking_metrics(noise * 1e4, grades, real)["kendall_tau"], ranking_metrics(noise, grades, real)["kendall_tau"]
    )
