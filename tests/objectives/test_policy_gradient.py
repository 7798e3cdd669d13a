"""Neural PG-RANK: the mean over many draws against the exact gradient, by enumerating every ranking."""

from itertools import permutations

import pytest
import torch
from torch.testing import assert_close

from align.objectives import OBJECTIVES
from align.objectives.policy_gradient import _gumbel, completion_keys
from align.packing.batch import draw_key

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


def test_the_draw_depends_on_the_key_and_the_seed_alone():
    scores, grades = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4).double()
    mask, keys = torch.ones(6, 4, dtype=torch.bool), completion_keys(torch.arange(6), 4)
    together = pl_policy_gradient(scores, grades, mask, keys=keys)
    alone = [pl_policy_gradient(*(x[i : i + 1] for x in (scores, grades, mask)), keys=keys[i : i + 1]) for i in (5, 2)]
    assert_close(torch.cat(alone), together[[5, 2]])
    assert not torch.isclose(pl_policy_gradient(scores, grades, mask, keys=keys, seed=1), together).any()


def test_rounding_of_the_scores_changes_no_draw():
    """The draw was a hash of the rounded scores: a list cut otherwise was ranked otherwise."""
    scores, grades = torch.zeros(400, 4), torch.tensor([[1.0, 0.5, 0.5, 0.0]]).expand(400, 4)
    mask, keys = torch.ones(400, 4, dtype=torch.bool), completion_keys(torch.arange(400), 4)
    exact = pl_policy_gradient(scores, grades, mask, keys=keys)
    noisy = pl_policy_gradient(scores + 1e-6 * torch.randn(400, 4), grades, mask, keys=keys)
    assert_close(noisy, exact, atol=1e-5, rtol=0)


def test_lists_that_look_the_same_do_not_share_their_draws():
    """The mean gradient of 64 of them scatters, over steps, as that of independent lists does: by 1/8 of one list's."""
    grades, mask = torch.tensor([[1.0, 0.5, 0.0]]).expand(64, 3), torch.ones(64, 3, dtype=torch.bool)
    of_one, of_all = [], []
    for step in range(200):
        scores = torch.zeros(64, 3, requires_grad=True)
        keys = completion_keys(torch.tensor([draw_key(step, str(row), 0) for row in range(64)]), 3)
        loss = pl_policy_gradient(scores, grades, mask, samples=4, keys=keys).sum()
        gradient = torch.autograd.grad(loss, scores)[0]
        of_one.append(gradient[0])
        of_all.append(gradient.mean(dim=0))
    ratio = torch.stack(of_all).std(dim=0) / torch.stack(of_one).std(dim=0)
    assert_close(ratio, torch.full((3,), 1 / 8), atol=0.03, rtol=0)


def test_the_noise_is_gumbel_and_independent():
    noise = _gumbel(completion_keys(torch.arange(400), 5), 50, 0)
    uniform = torch.exp(-torch.exp(-noise))
    assert_close(uniform.mean(), torch.tensor(0.5).double(), atol=0.005, rtol=0)
    assert_close(torch.histc(uniform, 10, 0, 1) / uniform.numel(), torch.full((10,), 0.1).double(), atol=0.005, rtol=0)
    for axis, allowed in ((0, 0.25), (1, 0.1), (2, 0.03)):  # lists, samples, places in the list
        rows = uniform.movedim(axis, 0).flatten(1)[:5]
        assert_close(torch.corrcoef(rows), torch.eye(5).double(), atol=allowed, rtol=0)


def test_tied_grades_and_scores_do_not_share_their_noise():
    """With equal noise, completions that nothing distinguishes would always be ranked side by side."""
    noise = _gumbel(completion_keys(torch.zeros(1, dtype=torch.long), 3), 300, 0)
    best_in_the_middle = (noise[0, :, 0] - noise[0, :, 1]) * (noise[0, :, 0] - noise[0, :, 2]) < 0
    assert 0.25 < best_in_the_middle.float().mean() < 0.42  # one third
