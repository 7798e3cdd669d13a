"""T-REG and TGDPO against their formulas in loops of Python floats, and the identities that define them."""

from math import exp, log1p

import pytest
import torch
from torch.testing import assert_close

from align.losses.list_loss import build_loss
from align.objectives import pair_weights, token_regularizer
from align.objectives.lambda_loss import Lambda
from align.objectives.pairwise import Logistic
from align.objectives.scores import LikelihoodMean, LogRatio, LogRatioMean
from align.objectives.token_reg import Tgdpo, TokenReg, list_places
from align.packing.batch import collate
from align.types import TokenStats

SIZES = ((3, 5), (4, 1, 6, 2), (2, 2, 3))
"""Tokens of the completions of three lists."""


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


@pytest.fixture
def lists():
    """Lists with grades (some tied), token rewards and log-probabilities, in float64."""
    generator = torch.Generator().manual_seed(11)

    def numbers(n: int, low: float, high: float) -> list[float]:
        return (low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)).tolist()

    rows = []
    for sizes in SIZES:
        rows.append(
            {
                "prompt_ids": [1],
                "completion_ids": [[3] * n for n in sizes],
                "grades": [float(g) for g in torch.randperm(3, generator=generator)[:2].tolist() * 2][: len(sizes)],
                "token_rewards": [numbers(n, -0.5, 0.5) for n in sizes],
                "policy": [numbers(n, -4, 0) for n in sizes],
                "reference": [numbers(n, -4, 0) for n in sizes],
            }
        )
    assert any(len(set(row["grades"])) < len(row["grades"]) for row in rows)
    return rows


def as_tensors(rows):
    """The batch, and log-probabilities that want a gradient; NaN where no token is, to see that nothing reads it."""
    batch = collate(rows, pad_id=0)
    width = batch.targets.shape[1]

    def padded(name: str) -> torch.Tensor:
        values = [own + [float("nan")] * (width - len(own)) for row in rows for own in row[name]]
        return torch.tensor(values, dtype=torch.float64)

    policy = padded("policy").requires_grad_()
    return batch, policy, padded("reference")


def losses(rows, score, objective, **options):
    batch, policy, reference = as_tensors(rows)
    reference = None if score.name.startswith("likelihood") else reference
    found = build_loss(score, [objective], **options)(TokenStats(policy), reference, batch)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    return found.tolist(), gradient


def by_hand(row, *, beta, alpha, mean=False, free=False, gamma=0.0, static=None, weights=None) -> float:
    """-log sigmoid(s_i - s_j - gamma) + alpha w (L_i + L_j) over ordered pairs, each times its weight."""
    scores, regularizers = [], []
    for k, own in enumerate(row["policy"]):
        scale = beta / len(own) if mean else beta
        other = [0.0] * len(own) if free else row["reference"][k]
        scores.append(sum(scale * (a - b) for a, b in zip(own, other, strict=True)))
        regularizers.append(-sum(scale * r * a for r, a in zip(row["token_rewards"][k], own, strict=True)))
    total = 0.0
    for i, better in enumerate(row["grades"]):
        for j, worse in enumerate(row["grades"]):
            if better > worse:
                w = sigmoid(scores[j] - scores[i] + gamma) if static is None else static
                pair = log1p(exp(scores[j] - scores[i] + gamma)) + alpha * w * (regularizers[i] + regularizers[j])
                total += pair * (1.0 if weights is None else weights[i][j])
    return total


def test_the_regularizer_of_a_completion_is_the_formula():
    logprobs, rewards = torch.tensor([[-1.0, -2.0, float("nan")]]), torch.tensor([[0.25, -0.1, float("nan")]])
    mask = torch.tensor([[True, True, False]])
    found = token_regularizer(logprobs.requires_grad_(), rewards.requires_grad_(), mask, beta=0.3)
    assert found.tolist() == pytest.approx([-0.3 * (0.25 * -1.0 + -0.1 * -2.0)])
    found.sum().backward()
    assert_close(logprobs.grad, torch.tensor([[-0.3 * 0.25, 0.3 * 0.1, 0.0]]))
    assert rewards.grad is None


@pytest.mark.parametrize("static", [None, 0.7])
def test_on_the_log_ratio_it_is_the_formula(lists, static):
    found, _ = losses(lists, LogRatio(beta=0.3), Logistic(), regularizer=TokenReg(alpha=0.4, static_weight=static))
    assert found == pytest.approx([by_hand(row, beta=0.3, alpha=0.4, static=static) for row in lists], abs=1e-6)


def test_on_means_it_divides_by_length_and_simpo_has_its_margin(lists):
    regularizer = TokenReg(alpha=0.4)
    found, _ = losses(lists, LogRatioMean(beta=3.0), Logistic(), regularizer=regularizer)
    assert found == pytest.approx([by_hand(row, beta=3.0, alpha=0.4, mean=True) for row in lists], abs=1e-6)
    found, _ = losses(lists, LikelihoodMean(beta=2.0), Logistic(margin=0.5), regularizer=regularizer)
    expected = [by_hand(row, beta=2.0, alpha=0.4, mean=True, free=True, gamma=0.5) for row in lists]
    assert found == pytest.approx(expected, abs=1e-6)


def test_lambda_weighs_the_pairs_of_the_regularizer_as_its_own(lists):
    score, objective = LogRatio(beta=0.3), Lambda()
    found, _ = losses(lists, score, objective, regularizer=TokenReg(alpha=0.4))
    batch, policy, reference = as_tensors(lists)
    scores = build_loss(score, [objective]).scores(TokenStats(policy), reference, batch)
    weights = pair_weights("lambda", scores, batch.grades.double(), batch.list_mask).tolist()
    expected = [by_hand(row, beta=0.3, alpha=0.4, weights=w) for row, w in zip(lists, weights, strict=True)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_term_s_weight_is_its_regularizer_s_too(lists):
    single, _ = losses(lists, LogRatio(), Logistic(), regularizer=TokenReg())
    half, _ = losses(lists, LogRatio(), Logistic(weight=0.5), regularizer=TokenReg())
    assert half == pytest.approx([value / 2 for value in single])


@pytest.mark.parametrize("alpha", [0.25, 1.9])
def test_a_token_s_gradient_is_scaled_by_its_reward(lists, alpha):
    """-(w beta)(1 + alpha rhat) on the better and +(w beta)(1 - alpha rhat) on the worse of a pair: no sign flips."""
    pair = lists[:1]
    (row,), beta = pair, 0.3
    _, gradient = losses(pair, LogRatio(beta=beta), Logistic(), regularizer=TokenReg(alpha=alpha))
    scores = [beta * (sum(a) - sum(b)) for a, b in zip(row["policy"], row["reference"], strict=True)]
    best = row["grades"].index(max(row["grades"]))
    w = sigmoid(scores[1 - best] - scores[best])
    for k, rewards in enumerate(row["token_rewards"]):
        sign = -1 if k == best else 1
        expected = [sign * w * beta * (1 - sign * alpha * reward) for reward in rewards]
        assert gradient[k, : len(rewards)].tolist() == pytest.approx(expected, abs=1e-7)
        assert all(sign * value > 0 for value in expected)
        assert (gradient[k, len(rewards) :] == 0).all()


def test_without_detaching_the_weight_moves_too(lists):
    """d/ds of alpha sigmoid(s_j - s_i)(L_i + L_j), by finite differences of the formula by hand."""
    (row,) = pair = lists[:1]
    _, gradient = losses(pair, LogRatio(beta=0.3), Logistic(), regularizer=TokenReg(alpha=0.4, detach_weight=False))
    step = 1e-6
    for k in range(2):
        moved = []
        for sign in (1, -1):
            policy = [list(own) for own in row["policy"]]
            policy[k][0] += sign * step
            moved.append(by_hand(row | {"policy": policy}, beta=0.3, alpha=0.4))
        assert gradient[k, 0].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("objective", [Logistic(), Lambda(), Logistic(margin=0.2)])
def test_alpha_zero_is_the_base_objective_bit_for_bit(lists, objective):
    base, base_gradient = losses(lists, LogRatio(), objective)
    found, gradient = losses(lists, LogRatio(), objective, regularizer=TokenReg(alpha=0.0))
    assert found == base
    assert torch.equal(gradient, base_gradient)


def test_at_two_the_list_form_is_the_pair_form_times_lambda_s_constant(lists):
    pair = [lists[0] | {"grades": [1.0, 0.0]}]
    dpo, dpo_gradient = losses(pair, LogRatio(), Logistic(), regularizer=TokenReg())
    found, gradient = losses(pair, LogRatio(), Lambda(), regularizer=TokenReg())
    constant = (2 - 1) * (1 - 1 / torch.log2(torch.tensor(3.0)).item())
    assert found == pytest.approx([constant * value for value in dpo], rel=1e-6)
    assert_close(gradient, constant * dpo_gradient, rtol=1e-6, atol=0)


def test_a_list_of_ties_has_none(lists):
    tied = [row | {"grades": [1.0] * len(row["grades"])} for row in lists]
    found, gradient = losses(tied, LogRatio(), Logistic(), regularizer=TokenReg())
    assert found == [0.0] * len(tied)
    assert (gradient == 0).all()


def test_places_run_from_best_to_worst():
    grades = torch.tensor([[1.0, 0.0, 9.0], [2.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True] * 3, [True] * 3])
    assert list_places(grades, mask).tolist() == [[1, -1, 0], [1, 0, -1], [1, 1, -1]]


def test_tgdpo_on_a_pair_is_the_formula(lists):
    """-log sigmoid(sum_c beta (1 + alpha rho) l - sum_r beta (1 - alpha rho) l), l the token's log-ratio."""
    pair, alpha, beta = lists[:1], 0.6, 0.3
    (row,) = pair
    best = row["grades"].index(max(row["grades"]))
    sums = []
    for k, sign in ((best, 1), (1 - best, -1)):
        tokens = zip(row["policy"][k], row["reference"][k], row["token_rewards"][k], strict=True)
        sums.append(sum(beta * (1 + sign * alpha * rho) * (a - b) for a, b, rho in tokens))
    found, _ = losses(pair, LogRatio(beta=beta), Logistic(), token_weights=Tgdpo(alpha=alpha))
    assert found == pytest.approx([log1p(exp(sums[1] - sums[0]))], abs=1e-6)
