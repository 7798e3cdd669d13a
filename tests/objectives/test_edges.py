"""Edges of single objectives that the contract test does not reach."""

from math import exp, log

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.errors import UserError
from align.objectives import OBJECTIVE, OBJECTIVES, dpop_penalty
from align.objectives.listwise import decoupled_softmax, soft_top_k, softmax
from align.objectives.noise import resolution, settled, sum_noise
from align.objectives.robust_softmax import robust_softmax
from align.objectives.spherical import spherical
from align.recipe import parse_recipe

PAIR = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)


def test_odds_of_a_certain_completion_are_finite():
    """A mean log-probability of 0, or above it by rounding, has infinite odds."""
    for best in (0.0, 1e-7, -1e-9):
        scores = torch.tensor([[best, -1.0]], requires_grad=True)
        loss = OBJECTIVES["odds_ratio"](scores, *PAIR)
        assert 0 <= loss.item() < 1e-5
        assert torch.autograd.grad(loss.sum(), scores)[0].isfinite().all()


def test_the_likelihood_term_may_be_of_the_first_of_several_best():
    """RRHF's and Rescue's code: argmax of the grades, which is the first."""
    scores = torch.tensor([[9.0, -1.0, -2.0, -4.0], [-3.0, -5.0, 9.0, 9.0]], requires_grad=True)
    grades = torch.tensor([[9.0, 1.0, 2.0, 2.0], [1.0, 1.0, 7.0, 7.0]])
    real = torch.tensor([[False, True, True, True], [True, True, False, False]])
    sft = OBJECTIVES["sft"]
    assert sft(scores, grades, real).tolist() == [3.0, 4.0]
    first = sft(scores, grades, real, ties="first")
    assert first.tolist() == [2.0, 3.0]
    assert torch.autograd.grad(first.sum(), scores)[0].tolist() == [[0, 0, -1, 0], [-1, 0, 0, 0]]


def test_noise_neither_ranks_nor_pushes():
    """A score of the reference's own noise is no fall (DPOP), and a margin of noise no violation (Rescue's hinge)."""
    grades, real = torch.tensor([[1.0, 0.0, 0.5]]), torch.ones(1, 3, dtype=torch.bool)
    noise = torch.full((1, 3), 1e-4)
    for sign in (1, -1):
        scores = (sign * torch.tensor([[-0.9e-4, 0.9e-4, 0.0]])).requires_grad_()
        loss = OBJECTIVES["partial_order"](scores, grades, real, noise=noise)
        penalty = dpop_penalty(scores, grades, real, strength=5.0, noise=noise)
        assert loss.item() == 0 and (penalty == 0).all()
        assert (torch.autograd.grad(loss.sum() + penalty.sum(), scores)[0] == 0).all()
    scores = torch.tensor([[-0.5, 0.25, 0.0]])
    assert OBJECTIVES["partial_order"](scores, grades, real, noise=noise).item() == 0.75 + 0.5 + 0.25
    assert dpop_penalty(scores, grades, real, strength=5.0, noise=noise).tolist() == [[2.5, 0, 0]]


def test_ties_are_groups_by_sorted_gaps():
    nan = float("nan")
    scores = torch.tensor([[0.0, 3.0, 1.9, 1.0, nan], [5.0, nan, nan, nan, nan], [1.0, 1.0, 2.0, -7.0, 9.0]])
    real = ~scores.isnan()
    real[2, 4] = False
    places = settled(scores, real, torch.full((3, 5), 0.5)).masked_fill(~real, -1)
    assert places.tolist() == [[1, 2, 1, 1, -1], [1, -1, -1, -1, -1], [2, 2, 2, 1, -1]]
    order = [3, 0, 4, 1, 2]
    moved = settled(scores[:, order], real[:, order], torch.full((3, 5), 0.5)).masked_fill(~real[:, order], -1)
    assert moved.tolist() == places[:, order].tolist()


def test_the_noise_of_a_sum_grows_with_its_tokens_and_their_size():
    """relative * sqrt(sum of (slope (1 + |lp|))^2), and a step of the score's own last digit."""
    lp = torch.tensor([[-3.0, -1.0, 50.0], [-3.0, -1.0, -7.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    beta, relative = 0.5, 1e-3
    found = sum_noise(lambda own: beta * own.masked_fill(~mask, 0).sum(dim=1), lp, mask, relative)
    expected = [relative * beta * (16 + 4) ** 0.5, relative * beta * (16 + 4 + 64) ** 0.5]
    assert_close(found, torch.tensor(expected), rtol=1e-3, atol=0)
    assert resolution(torch.float32, torch.bfloat16) > 1000 * resolution(torch.float32)


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


def test_decoupled_positives_do_not_compete():
    """One positive is `softmax`; a second one adds its own term and leaves the first's as it is."""
    scores = torch.randn(1, 4, dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    first, second, both = (
        torch.tensor([own], dtype=torch.float64) for own in ([1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0])
    )
    assert_close(decoupled_softmax(scores, first, mask), softmax(scores, first, mask))
    without = [torch.tensor([[i != gone for i in range(4)]]) for gone in (1, 0)]
    alone = decoupled_softmax(scores, first, without[0]) + decoupled_softmax(scores, second, without[1])
    assert_close(decoupled_softmax(scores, first + second, mask), alone)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_soft_top_k_has_k_places_and_is_the_top_k_when_cold(k):
    scores = torch.randn(1, 6, dtype=torch.float64)
    mask = torch.ones(1, 6, dtype=torch.bool)

    def shares(temperature: float) -> Tensor:
        each = [soft_top_k(scores, one[None], mask, k=k, temperature=temperature) for one in torch.eye(6).double()]
        return torch.exp(-torch.cat(each))

    assert_close(shares(0.7).sum(), torch.tensor(float(k), dtype=torch.float64))
    expected = torch.zeros(6, dtype=torch.float64)
    expected[scores[0].topk(k).indices] = 1
    assert_close(shares(1e-3), expected, atol=1e-6, rtol=0)


def test_a_list_takes_the_beta_that_its_spread_asks_for():
    """Scores a hundred times as far apart give a loss a hundred times as large: t goes with them."""
    scores, mask = torch.randn(1, 5, dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool)
    grades = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    free = {"weakest": 1e-6, "strongest": 1e6}
    assert_close(robust_softmax(100 * scores, grades, mask, **free), 100 * robust_softmax(scores, grades, mask, **free))
    held = robust_softmax(scores, grades, mask, weakest=1.0, strongest=1.0)
    assert_close(held, softmax(scores, grades, mask) - log(5) + 0.2)


def test_a_spherical_loss_knows_neither_shift_nor_scale():
    scores, mask = torch.randn(1, 5, dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool)
    grades = torch.rand(1, 5, dtype=torch.float64)
    assert_close(spherical(7 * scores - 3, grades, mask), spherical(scores, grades, mask))


@pytest.mark.parametrize("name", ["spherical", "robust_softmax"])
def test_they_train_a_reward_model_too(name):
    tree = {"output": "o", "policy": {"model": "m"}, "data": {"sources": ["a"]}, "task": "reward", "objective": name}
    assert parse_recipe(tree, origin="test").objective[0].name == name
    score = {"name": "likelihood_mean", "beta": 3}
    with pytest.raises(UserError, match=f"`score` of `{name}` is about a policy"):
        parse_recipe(tree | {"objective": {"name": name, "score": score}}, origin="test")


@pytest.mark.parametrize("normaliser", ["stablemax", "softplus"])
def test_a_normaliser_is_exact_far_out_and_teaches_at_scores_of_0(normaliser):
    """Before training all scores are 0: stablemax's f'/f is 1 there, softplus' 1 / (2 log 2), softmax's 1."""
    grades, mask = torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    start = torch.zeros(1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(softmax(start, grades, mask, normaliser=normaliser).sum(), start)
    slope = 1.0 if normaliser == "stablemax" else 1 / (2 * log(2))
    assert_close(gradient, slope * torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]))
    far = torch.tensor([[-300.0, -14.9, 200.0], [-301.0, -300.0, -302.0], [-15.1, -5.5, -39.0]], requires_grad=True)
    wide = far.detach().double().requires_grad_()
    log_f = {
        "stablemax": lambda x: torch.where(x >= 0, 1 + x, 1 / (1 - x)).log(),
        "softplus": lambda x: torch.where(x < -30, x, x.exp().log1p().where(x < 30, x).log()),
    }[normaliser](wide)
    expected = -(log_f - log_f.logsumexp(1, keepdim=True))[:, 0]
    found = softmax(far, grades.expand(3, 3), mask.expand(3, 3), normaliser=normaliser)
    assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    one, two = torch.autograd.grad(found.sum(), far)[0], torch.autograd.grad(expected.sum(), wide)[0]
    assert_close(one.double(), two, rtol=1e-5, atol=1e-6)


def test_only_exponentials_go_with_a_divergence_of_differences():
    tree = {"name": "softmax", "normaliser": "stablemax"}
    assert OBJECTIVE.classes["softmax"]().holds.shift_invariant
    assert not OBJECTIVE.classes["softmax"](**tree).holds.shift_invariant
