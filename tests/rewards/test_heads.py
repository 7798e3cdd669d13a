"""Losses of a reward head against their formulas written out in float64 loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm
from torch.testing import assert_close

from rewards.heads import bradley_terry, fidelity, min_norm_weights, soft_bin_loss, soft_bins, squared_error

NAN = math.nan


def lists(size: int = 4, count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, grades with ties, and a mask with at least one completion; padding holds NaN."""
    rewards = torch.randn(count, size, dtype=torch.float64)
    grades = torch.randint(0, 3, (count, size)).double()
    mask = torch.arange(size) < torch.tensor([size, 1, 2, 3, size])[:count, None]
    return rewards.masked_fill(~mask, NAN), grades.masked_fill(~mask, NAN), mask


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def by_loops(rewards, grades, mask, strengths, form, center):
    losses = []
    for r, g, own, stated in zip(rewards.tolist(), grades.tolist(), mask.sum(1).tolist(), strengths, strict=True):
        terms = []
        for i, j in itertools.permutations(range(own), 2):
            m = g[i] - g[j] if math.isnan(stated) else stated
            if g[i] > g[j] and stated != 0:
                d = r[i] - r[j]
                loss = {"none": -log_sigmoid(d), "margin": -log_sigmoid(d - m), "scaled": -m * log_sigmoid(d)}[form]
                terms.append(loss + center * (r[i] + r[j]) ** 2)
        losses.append(sum(terms) / len(terms) if terms else 0.0)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("center", [0.0, 0.1])
@pytest.mark.parametrize("form", ["none", "margin", "scaled"])
def test_bradley_terry_is_the_formula(form, center):
    rewards, grades, mask = lists()
    strengths = torch.tensor([NAN, 1.0, 3.0, 0.0, 2.0], dtype=torch.float64)
    expected = by_loops(rewards, grades, mask, strengths.tolist(), form, center)
    assert_close(bradley_terry(rewards, grades, mask, strengths, strength=form, center=center), expected)
    assert expected[3] == 0 and expected[4] > 0


@pytest.mark.parametrize("form", ["none", "margin", "scaled"])
def test_padding_and_pairs_without_preference_get_no_gradient(form):
    rewards, grades, mask = lists()
    rewards.requires_grad_()
    strengths = torch.tensor([NAN, 1.0, 3.0, 0.0, 2.0], dtype=torch.float64)
    bradley_terry(rewards, grades, mask, strengths, strength=form, center=0.1).sum().backward()
    assert (rewards.grad[~mask] == 0).all() and (rewards.grad[3] == 0).all() and rewards.grad[4].abs().sum() > 0


def test_squared_error_is_a_mean_over_known_ratings():
    predicted, ratings = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    known = torch.tensor([[[1, 0], [1, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 1]]], dtype=torch.bool)
    ratings = ratings.masked_fill(~known, NAN)
    first = [(predicted[0, k, a] - ratings[0, k, a]) ** 2 for k, a in ((0, 0), (1, 0), (1, 1))]
    last = (predicted[2, 1, 1] - ratings[2, 1, 1]) ** 2
    expected = torch.stack([sum(first) / 3, torch.zeros((), dtype=torch.float64), last])
    predicted.requires_grad_()
    loss = squared_error(predicted, ratings, known)
    assert_close(loss, expected)
    loss.sum().backward()
    assert (predicted.grad[~known] == 0).all()


@pytest.mark.parametrize("mean", [1.0, 1.3, 2.5, 3.0, 3.4, 4.8, 5.0])
@pytest.mark.parametrize("deviation", [0.1, 0.5, 1.0])
def test_soft_bins_keep_the_mean(mean, deviation):
    """The linear correction keeps it exactly until a probability is cut at 0; then, as published, within 0.1."""
    p = soft_bins(torch.tensor(mean, dtype=torch.float64), deviation)
    assert p.sum().item() == pytest.approx(1) and (p >= 0).all()
    raw = norm.pdf(np.arange(1, 6), mean, deviation)
    a, b = raw.sum(), (np.arange(1, 6) * raw).sum()
    alpha = (mean - 3) / (b - 3 * a) if mean != 3 else 1.0
    corrected = alpha * raw + (1 - alpha * a) / 5
    recovered = (p * torch.arange(1, 6)).sum().item()
    if deviation > 0.2 and corrected.min() >= 0:
        np.testing.assert_allclose(p.numpy(), corrected, atol=1e-12)
        assert recovered == pytest.approx(mean, abs=1e-9)
    assert recovered == pytest.approx(mean, abs=0.1)


def test_soft_bin_loss_is_the_divergence_between_two_distributions():
    predicted, ratings = torch.tensor([1.2, 3.0, 4.6]).double(), torch.tensor([2.0, 3.0, 4.5]).double()
    expected = []
    for r, y in zip(predicted.tolist(), ratings, strict=True):
        edges = np.array([-np.inf, 1.5, 2.5, 3.5, 4.5, np.inf])
        q, p = np.diff(norm.cdf(edges - r)), soft_bins(y, 0.8).numpy()
        expected.append(sum(p[c] * math.log(p[c] / q[c]) for c in range(5) if p[c] > 0))
    known = torch.ones(3, 1, 1, dtype=torch.bool)
    loss = soft_bin_loss(predicted[:, None, None], ratings[:, None, None], known, deviation=0.8)
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_soft_bin_loss_is_finite_far_away_and_its_gradient_right():
    far = torch.tensor([[[-50.0, 60.0, NAN]]], requires_grad=True)
    known = torch.tensor([[[True, True, False]]])
    soft_bin_loss(far, torch.tensor([[[5.0, 1.0, NAN]]]), known).sum().backward()
    assert far.grad[0, 0, 0] < 0 < far.grad[0, 0, 1] and far.grad[0, 0, 2] == 0 and far.grad.isfinite().all()
    near = torch.tensor([[[0.7, 2.9, 5.2]]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[[1.5, 3.0, 4.0]]], dtype=torch.float64)
    every = torch.ones(1, 1, 3, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: soft_bin_loss(x, target, every), near)


def test_fidelity_is_the_formula():
    rewards, ratings, mask = lists()
    ratings[4, 1] = NAN
    expected = []
    for r, y in zip(rewards.tolist(), ratings.tolist(), strict=True):
        terms = []
        for i, j in itertools.combinations([k for k in range(4) if not math.isnan(y[k])], 2):
            p, q = norm.cdf((y[i] - y[j]) / (0.7 * math.sqrt(2))), norm.cdf((r[i] - r[j]) / math.sqrt(2))
            terms.append(1 - math.sqrt(p * q + 1e-8) - math.sqrt((1 - p) * (1 - q) + 1e-8))
        expected.append(sum(terms) / len(terms) if terms else 0.0)
    loss = fidelity(rewards, ratings, mask, deviation=0.7)
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_each_completion_has_a_deviation_of_its_own():
    """Thurstone's: Phi((y_i - y_j) / sqrt(s_i^2 + s_j^2)); two ratings without any are certain."""
    rewards, ratings = torch.randn(1, 3).double(), torch.tensor([[3.0, 2.0, 2.5]]).double()
    s = [0.0, 0.0, 1.3]
    terms = []
    for i, j in itertools.combinations(range(3), 2):
        gap, spread = (ratings[0, i] - ratings[0, j]).item(), math.hypot(s[i], s[j])
        p = norm.cdf(gap / spread) if spread else float(gap > 0)
        q = norm.cdf((rewards[0, i] - rewards[0, j]).item() / math.sqrt(2))
        terms.append(1 - math.sqrt(p * q + 1e-8) - math.sqrt((1 - p) * (1 - q) + 1e-8))
    mask, deviation = torch.ones(1, 3, dtype=torch.bool), torch.tensor([s]).double()
    assert fidelity(rewards, ratings, mask, deviation=deviation).item() == pytest.approx(sum(terms) / 3)

    means, stds = torch.tensor([1.3, 2.5, 4.8]).double(), torch.tensor([0.1, 0.7, 1.0]).double()
    apart = torch.stack([soft_bins(mean, std.item()) for mean, std in zip(means, stds, strict=True)])
    assert_close(soft_bins(means, stds), apart)


@pytest.mark.parametrize("sets", [2, 3, 5])
def test_min_norm_weights_are_the_shortest_point_of_the_simplex(sets):
    gradients = torch.randn(sets, 6, dtype=torch.float64) + 0.3
    rows = gradients.numpy()
    found = minimize(
        lambda w: ((w @ rows) ** 2).sum(),
        np.full(sets, 1 / sets),
        bounds=[(0, 1)] * sets,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        tol=1e-12,
    )
    weights = min_norm_weights(gradients)
    assert weights.sum().item() == pytest.approx(1) and (weights >= 0).all()
    assert ((weights.numpy() @ rows) ** 2).sum() == pytest.approx(
        found.fun, abs=1e-3
    )  # Frank-Wolfe nears it as 1 / steps


def test_a_set_without_a_gradient_keeps_its_share():
    weights = min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    assert_close(weights, torch.tensor([0.4, 0.25, 0.1, 0.25]))
