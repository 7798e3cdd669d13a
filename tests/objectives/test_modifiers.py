"""WPO's weights and DPOP's penalty against their formulas on Python floats."""

from math import exp, log

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from align.objectives import OBJECTIVES
from align.objectives.modifiers import dpop_penalty, wpo_list_weights, wpo_weights


def test_wpo_weight_is_the_mean_aligned_log_probability():
    nan = float("nan")
    logprobs = torch.tensor([[log(0.5), log(0.2), nan], [log(0.9), nan, nan]], requires_grad=True)
    sum_sq = torch.tensor([[log(0.5**2 + 0.5**2), log(0.2**2 + 0.8**2), nan], [log(0.9**2 + 0.1**2), nan, nan]])
    expected = [(log(0.5 / 0.5) + log(0.2 / 0.68)) / 2, log(0.9 / 0.82)]
    weights = wpo_weights(logprobs, sum_sq, ~sum_sq.isnan())
    assert_close(weights, torch.tensor(expected))
    assert not weights.requires_grad


def test_an_empty_completion_has_weight_one():
    empty = torch.full((1, 2), torch.nan)
    assert wpo_weights(empty, empty, torch.zeros(1, 2, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize(("clamp", "first"), [(True, 1.0), (False, exp(0.4 - 0.1))])
def test_wpo_weight_of_a_pair_is_the_product(clamp, first):
    log_weights = torch.tensor([[0.4, -0.1], [-0.5, -0.3]])
    real = torch.ones(2, 2, dtype=torch.bool)
    assert_close(wpo_list_weights(log_weights, real, clamp=clamp), torch.tensor([first, exp(-0.5 - 0.3)]))


def test_wpo_weight_of_a_list_is_the_geometric_mean_over_its_pairs():
    u = [-0.2, -0.9, -0.4]
    pairs = [exp(u[0] + u[1]), exp(u[0] + u[2]), exp(u[1] + u[2])]
    real = torch.tensor([[True, True, True, False]])
    weight = wpo_list_weights(torch.tensor([[*u, torch.nan]]), real)
    assert_close(weight, torch.tensor([(pairs[0] * pairs[1] * pairs[2]) ** (1 / 3)]))


def test_dpop_with_logistic_is_the_papers_loss():
    beta, strength = 0.1, 5.0
    log_ratios = torch.tensor([[-3.0, -4.0], [2.0, -1.0], [-0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    grades = torch.tensor([[1.0, 0.0]] * 3).double()
    a, b = log_ratios[:, 0], log_ratios[:, 1]
    expected = -logsigmoid(beta * (a - b) - beta * strength * (-a).clamp(min=0))
    scores = beta * log_ratios
    penalised = scores - dpop_penalty(scores, grades, grades >= 0, strength=strength)
    losses = OBJECTIVES["logistic"](penalised, grades, grades >= 0)
    assert_close(losses, expected)
    theirs = torch.autograd.grad(expected.sum(), log_ratios, retain_graph=True)[0]
    assert_close(torch.autograd.grad(losses.sum(), log_ratios)[0], theirs)


def test_dpop_touches_the_best_only_and_nothing_of_ties_or_padding():
    nan = float("nan")
    scores = torch.tensor([[-1.0, -2.0, -3.0, nan], [-1.0, -2.0, nan, nan]], requires_grad=True)
    grades = torch.tensor([[1.0, 0.0, 1.0, nan], [0.5, 0.5, nan, nan]])
    penalty = dpop_penalty(scores, grades, ~grades.isnan(), strength=2.0)
    assert_close(penalty, torch.tensor([[2.0, 0, 6.0, 0], [0, 0, 0, 0]]))
    gradient = torch.autograd.grad(penalty.sum(), scores)[0]
    assert_close(gradient, torch.tensor([[-2.0, 0, -2.0, 0], [0, 0, 0, 0]]))
