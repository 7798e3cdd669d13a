"""Edges of single objectives that the contract test does not reach."""

from math import exp

import torch
from torch.testing import assert_close

from align.objectives import OBJECTIVES

PAIR = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)


def test_odds_of_a_certain_completion_are_finite():
    """A mean log-probability of 0, or above it by rounding, has infinite odds."""
    for best in (0.0, 1e-7, -1e-9):
        scores = torch.tensor([[best, -1.0]], requires_grad=True)
        loss = OBJECTIVES["odds_ratio"](scores, *PAIR)
        assert 0 <= loss.item() < 1e-5
        assert torch.autograd.grad(loss.sum(), scores)[0].isfinite().all()


def test_no_gradient_reaches_the_baseline_of_kto():
    baseline, scores = torch.tensor(0.4, requires_grad=True), torch.tensor([[0.9, -0.2]], requires_grad=True)
    loss = OBJECTIVES["kto"](scores, *PAIR, baseline=baseline)
    to_baseline, to_scores = torch.autograd.grad(loss.sum(), (baseline, scores), allow_unused=True)
    assert to_baseline is None

    def slope(x: float) -> float:
        return exp(-x) / (1 + exp(-x)) ** 2

    assert_close(to_scores, torch.tensor([[-slope(0.9 - 0.4), slope(-0.2 - 0.4)]]))


def test_discopop_is_finite_where_the_exponential_alone_overflows():
    scores = torch.tensor([[-100.0, 0.0]], requires_grad=True)
    loss = OBJECTIVES["discopop"](scores, *PAIR, temperature=0.05)
    assert_close(loss, torch.tensor([100.0]))  # all logistic, m e^{-d} = e^{-1900}
    assert_close(torch.autograd.grad(loss.sum(), scores)[0], torch.tensor([[-1.0, 1.0]]))
