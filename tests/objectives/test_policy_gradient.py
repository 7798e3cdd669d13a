"""Neural PG-RANK: the mean over many draws against the exact gradient, by enumerating every ranking."""

from itertools import permutations

import pytest
import torch
from torch.testing import assert_close

from align.objectives import OBJECTIVES
from align.objectives.policy_gradient import _gumbel

pl_policy_gradient = OBJECTIVES["pl_policy_gradient"]


def exact(scores, grades, cutoff):
    """Expected NDCG under Plackett-Luce and minus the covariance of NDCG and log-probability."""
    places = torch.arange(len(grades), dtype=torch.float64)
    discount = 1 / torch.log2(places + 2)
    discount[cutoff:] = 0
    ideal = ((2**grades - 1).sort(descending=True).values * discount).sum()
    orders = torch.tensor(list(permutations(range(len(grades)))))
    ranked = scores[orders]
    log_p = sum(ranked[:, k] - ranked[:, k:].logsumexp(dim=1) for k in range(len(grades)))
    utility = ((2**grades - 1)[orders] * discount).sum(dim=1) / ideal
    p = log_p.exp()
    covariance = (p * utility * log_p).sum() - (p * utility).sum() * (p * log_p).sum()
    return (p * utility).sum(), -covariance


@pytest.mark.parametrize("cutoff", [None, 1, 2])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_many_draws_give_the_gradient_of_minus_the_expected_ndcg(size, cutoff):
    scores = torch.randn(size, dtype=torch.float64, requires_grad=True)
    grades = torch.arange(size).flip(0).double() % 3
    utility, covariance = exact(scores, grades, cutoff or size)
    expected = -torch.autograd.grad(utility, scores)[0]
    one = torch.ones(1, size, dtype=torch.bool)
    loss = pl_policy_gradient(scores[None], grades[None], one, samples=60_000, cutoff=cutoff)
    assert_close(torch.autograd.grad(loss.sum(), scores)[0], expected, atol=0.006, rtol=0)
    assert_close(loss[0].detach(), covariance.detach(), atol=0.02, rtol=0)


def test_two_draws_are_unbiased():
    """Over many seeds; a baseline that includes the draw itself would halve the gradient."""
    leaf = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    grades, mask = torch.tensor([[0.0, 1.0, 2.0]]).double(), torch.ones(1, 3, dtype=torch.bool)
    expected = -torch.autograd.grad(exact(leaf, grades[0], 3)[0], leaf)[0]
    losses = [pl_policy_gradient(leaf[None], grades, mask, samples=2, seed=seed) for seed in range(1000)]
    assert_close(torch.autograd.grad(torch.stack(losses).mean(), leaf)[0], expected, atol=0.01, rtol=0)


def test_the_draw_depends_on_the_list_and_the_seed_alone():
    scores, grades = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4).double()
    mask = torch.ones(6, 4, dtype=torch.bool)
    together = pl_policy_gradient(scores, grades, mask)
    assert_close(
        torch.cat([pl_policy_gradient(scores[i : i + 1], grades[i : i + 1], mask[:1]) for i in range(6)]), together
    )
    assert not torch.isclose(pl_policy_gradient(scores, grades, mask, seed=1), together).any()


def test_the_draw_is_new_when_the_scores_have_moved():
    """Else every step would see the same draw, and its error would never average out."""
    grades, mask = torch.tensor([[1.0, 0.5, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    before = _gumbel(torch.zeros(1, 3), grades, mask, 4, 0)
    after = _gumbel(torch.tensor([[0.01, 0.0, 0.0]]), grades, mask, 4, 0)
    assert not torch.isclose(before, after).any()


def test_the_noise_is_gumbel_and_independent():
    grades = torch.rand(400, 5)
    noise = _gumbel(torch.zeros(400, 5), grades, torch.ones(400, 5, dtype=torch.bool), 50, 0)
    uniform = torch.exp(-torch.exp(-noise)).double()
    assert_close(uniform.mean(), torch.tensor(0.5).double(), atol=0.005, rtol=0)
    assert_close(torch.histc(uniform, 10, 0, 1) / uniform.numel(), torch.full((10,), 0.1).double(), atol=0.005, rtol=0)
    columns = uniform.flatten(0, 1).T  # one per place in the list
    assert_close(torch.corrcoef(columns), torch.eye(5).double(), atol=0.03, rtol=0)
    draws = uniform.permute(1, 0, 2).flatten(1)[:8]  # one per sample
    assert_close(torch.corrcoef(draws), torch.eye(8).double(), atol=0.1, rtol=0)


def test_tied_grades_and_scores_do_not_share_their_noise():
    """With equal noise, completions that nothing distinguishes would always be ranked side by side."""
    grades = torch.tensor([[1.0, 0.0, 0.0]])
    noise = _gumbel(torch.zeros(1, 3), grades, torch.ones(1, 3, dtype=torch.bool), 300, 0)
    best_in_the_middle = (noise[0, :, 0] - noise[0, :, 1]) * (noise[0, :, 0] - noise[0, :, 2]) < 0
    assert 0.25 < best_in_the_middle.float().mean() < 0.42  # one third
