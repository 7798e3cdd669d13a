"""AFT's gradients, part of whose value is constant: against the derivative written out, and where the push ends."""

from math import exp, log

import pytest
import torch
from torch.testing import assert_close

from align.objectives import OBJECTIVES

aft = OBJECTIVES["aft"]


def gradient(scores: list[float], grades: list[float], **options) -> torch.Tensor:
    leaf = torch.tensor([scores], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([grades], dtype=torch.float64)
    return torch.autograd.grad(aft(leaf, g, g == g, **options).sum(), leaf)[0][0]


def test_detached_moves_only_the_better_ones():
    s = [0.2, -0.4, 0.1]
    total = 1 + exp(-0.4 - 0.2) + exp(0.1 - 0.2)
    expected = torch.tensor([-(exp(-0.4 - 0.2) + exp(0.1 - 0.2)) / total, 0, 0], dtype=torch.float64)
    assert_close(gradient(s, [1, 0, 0], variant="detached"), expected)


@pytest.mark.parametrize("variant", ["boundary", "ranking"])
def test_no_gradient_flows_through_the_floor(variant):
    s, b = [0.2, -0.4], 0.3
    push, floor = exp(-0.4 - 0.2), exp(0.2 - 2 * b - -0.4)
    expected = torch.tensor([-push, push - floor], dtype=torch.float64) / (1 + push + floor)
    assert_close(gradient(s, [1, 0], variant=variant, margin=b), expected)


@pytest.mark.parametrize("variant", ["boundary", "ranking"])
def test_with_one_better_the_push_ends_a_margin_below_it_and_turns(variant):
    at, below, above = (gradient([0.5, 0.5 - 0.2 + x], [1, 0], variant=variant, margin=0.2)[1] for x in (0, -0.1, 0.1))
    assert_close(at, torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)
    assert below < 0 < above  # descent raises it from below, lowers it from above


def test_with_several_better_the_push_ends_where_the_two_sums_balance():
    better, b = [0.5, 0.9, -0.1], 0.2
    floor = min(better) - 2 * b
    end = (floor + log(len(better)) - log(sum(exp(-s) for s in better))) / 2
    assert end > min(better) - b
    assert_close(
        gradient([*better, end], [1, 1, 1, 0], variant="boundary", margin=b)[3],
        torch.tensor(0.0, dtype=torch.float64),
        atol=1e-12,
        rtol=0,
    )


def test_the_floor_of_a_middle_tier_counts_only_those_above_it():
    s, b = [0.2, -0.3, -0.9], 0.1  # grades 2, 1, 0: the floor of the middle one is set by the first alone
    pushes = [exp(-0.3 - 0.2), exp(-0.9 - 0.2), exp(-0.9 - -0.3)]
    floors = [exp(0.2 - 2 * b - -0.3), exp(-0.3 - 2 * b - -0.9), exp(-0.3 - 2 * b - -0.9)]
    expected = torch.tensor(
        [-pushes[0] - pushes[1], pushes[0] - pushes[2] - floors[0], pushes[1] + pushes[2] - floors[1] - floors[2]],
        dtype=torch.float64,
    ) / (1 + sum(pushes) + sum(floors))
    assert_close(gradient(s, [2, 1, 0], variant="ranking", margin=b), expected)
