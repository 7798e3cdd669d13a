"""How a recipe's score, objectives and modifiers become one loss per list, against the formulas in plain floats."""

from math import exp, log

import pytest
import torch

from align.losses.list_loss import build_loss, likelihood_loss
from align.objectives.pairwise import Logistic
from align.objectives.pointwise import Kto, Sft
from align.objectives.scores import LikelihoodMean, LogRatio
from align.packing.batch import collate
from align.types import TokenStats

BETA = 0.5
POLICY = [[-1.0, -2.0], [-1.5, -0.5, -0.7]]
REFERENCE = [[-0.8, -1.0], [-1.0, -1.0, -1.0]]
SQUARES = [[-0.5, -0.4], [-0.3, -0.2, -0.1]]


@pytest.fixture
def batch():
    """One pair; the first completion is the better one."""
    return collate([{"prompt_ids": [1], "completion_ids": [[3, 4], [5, 6, 7]], "grades": [1.0, 0.0]}], pad_id=0)


def padded(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([[*row, *[0.0] * (3 - len(row))] for row in rows])


def stats(**extra) -> TokenStats:
    return TokenStats(logprobs=padded(POLICY), **extra)


def ratios() -> list[float]:
    return [sum(p) - sum(r) for p, r in zip(POLICY, REFERENCE, strict=True)]


def softplus(x: float) -> float:
    return log(1 + exp(x))


def test_terms_add_up_with_their_weights_each_on_its_own_score(batch):
    loss = build_loss(LogRatio(beta=BETA), [Logistic(weight=2.0), Sft(weight=0.3, score=LikelihoodMean(beta=1.0))])
    a, b = ratios()
    expected = 2.0 * softplus(BETA * (b - a)) - 0.3 * sum(POLICY[0]) / 2
    assert loss(stats(), padded(REFERENCE), batch).item() == pytest.approx(expected, abs=1e-6)
    assert loss.scores(stats(), padded(REFERENCE), batch)[0].tolist() == pytest.approx([BETA * a, BETA * b])


def test_dpop_takes_the_fall_of_the_best_off_its_score(batch):
    """-log sigmoid(beta (A - B - lambda max(0, -A))), A the best's log-ratio, which is negative here."""
    a, b = ratios()
    assert a < 0
    loss = build_loss(LogRatio(beta=BETA), [Logistic()], dpop=5.0)
    expected = softplus(-BETA * (a - b - 5.0 * max(0.0, -a)))
    assert loss(stats(), padded(REFERENCE), batch).item() == pytest.approx(expected, abs=1e-6)


def test_the_penalty_on_log_z_is_a_mean_over_the_lists_tokens(batch):
    log_z = [[3.0, -1.0], [2.0, 0.5, 4.0]]
    loss, without = (build_loss(LogRatio(beta=BETA), [Logistic()], z_penalty=own) for own in (0.3, None))
    assert "logsumexp" in loss.outputs and "logsumexp" not in without.outputs
    seen = stats(logsumexp=padded(log_z))
    expected = 0.3 * sum(z * z for row in log_z for z in row) / 5
    added = loss(seen, padded(REFERENCE), batch) - without(seen, padded(REFERENCE), batch)
    assert added.item() == pytest.approx(expected, abs=1e-6)
    logged = loss.metrics(batch, seen, padded(REFERENCE), batch.grades)["log_z"]
    assert sorted(logged.tolist()) == sorted(sum(log_z, []))
    imitation = likelihood_loss(z_penalty=0.3)(seen, None, batch) - likelihood_loss()(seen, None, batch)
    assert imitation.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["clamped", "unclamped"])
def test_wpo_weighs_the_list(batch, kind):
    u = [sum(p - s for p, s in zip(*rows, strict=True)) / len(rows[0]) for rows in zip(POLICY, SQUARES, strict=True)]
    weight = exp(sum(u)) if kind == "unclamped" else min(1.0, exp(sum(u)))
    a, b = ratios()
    loss = build_loss(LogRatio(beta=BETA), [Logistic()], wpo=kind)
    assert "log_sum_sq_probs" in loss.outputs
    value = loss(stats(log_sum_sq_probs=padded(SQUARES)), padded(REFERENCE), batch)
    assert value.item() == pytest.approx(weight * softplus(BETA * (b - a)), abs=1e-6)


def test_kto_gets_its_baseline_in_the_unit_of_the_scores(batch):
    loss = build_loss(LogRatio(beta=BETA), [Kto()])
    assert loss.needs_baseline
    sigmoid = [1 / (1 + exp(-sign * BETA * (u - 0.7))) for sign, u in zip((1, -1), ratios(), strict=True)]
    value = loss(stats(), padded(REFERENCE), batch, torch.tensor(0.7))
    assert value.item() == pytest.approx(sum(1 - s for s in sigmoid) / 2, abs=1e-6) or value.item() == pytest.approx(
        sum(1 - s for s in sigmoid), abs=1e-6
    )


def test_what_needs_no_reference_says_so():
    assert not build_loss(LikelihoodMean(), [Logistic(margin=1.0)]).needs_reference
    assert not likelihood_loss().needs_reference
    assert build_loss(LogRatio(), [Logistic()]).needs_reference
