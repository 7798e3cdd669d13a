"""Objectives that treat each completion by itself; all but the first two also take single completions (K = 1).

Arguments: scores s in nats (beta included), grades g (larger is better), list_mask (False marks padding, whose score
and grade may hold anything, even NaN). A list's loss is the sum over its completions, so a list of K weighs as much as
K lists of one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from align.objectives.base import Properties
from align.objectives.lists import best_graded, masked_mean, masked_sum
from align.objectives.objective import OBJECTIVE, Objective
from align.objectives.scores import LikelihoodMean, ScoreConfig
from align.tensors import Bool, F, Float, Tensor, torch


def pointwise_mse(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Regression of the score to the grade.

    sum_k (g_k - s_k)^2

    Args:
        scores, grades, list_mask: see the module.

    Returns:
        One loss per list, in squared nats.

    Source: LiPO, arXiv:2402.01878, section 3.
    """
    scores = scores.masked_fill(~list_mask, 0)
    grades = grades.masked_fill(~list_mask, 0).to(scores.dtype)
    return (grades - scores).square().sum(dim=1)


@OBJECTIVE.add
class PointwiseMse(Objective):
    """Squared error against the grades."""

    formula = staticmethod(pointwise_mse)
    properties = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, of_rewards=True)

    name: Literal["pointwise_mse"] = "pointwise_mse"


def pointwise_sigmoid(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Cross-entropy of sigmoid(score) against the grade as a probability.

    -sum_k [g_k log sigmoid(s_k) + (1 - g_k) log sigmoid(-s_k)]

    Args:
        scores, list_mask: see the module.
        grades: in [0, 1].

    Returns:
        One loss per list, in nats.

    Source: LiPO, arXiv:2402.01878, section 3.
    """
    scores = scores.masked_fill(~list_mask, 0)
    grades = grades.masked_fill(~list_mask, 0).to(scores.dtype)
    return masked_sum(-grades * F.logsigmoid(scores) - (1 - grades) * F.logsigmoid(-scores), list_mask)


@OBJECTIVE.add
class PointwiseSigmoid(Objective):
    """Cross-entropy against the grades as probabilities."""

    formula = staticmethod(pointwise_sigmoid)
    properties = Properties(
        shift_invariant=False, zero_when_tied=False, dpo_at_two=False, grades="unit", of_rewards=True
    )

    name: Literal["pointwise_sigmoid"] = "pointwise_sigmoid"


def kto(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    baseline: Float[Tensor, ""] | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """KTO: each completion is desirable or not, and its score is judged against the policy's distance to the reference.

    desirable: w_d (1 - sigmoid(s - z));  undesirable: w_u (1 - sigmoid(z - s));  z = baseline

    Args:
        scores, list_mask: see the module.
        grades: above one half is desirable.
        baseline: z, an estimate of beta * KL(policy || reference), in the unit of the scores: the mean score of
            mismatched completions, at least 0. It is constant in the backward pass.
        desirable_weight: w_d.
        undesirable_weight: w_u.

    Returns:
        One loss per list, in units of probability.

    Source: KTO, arXiv:2402.01306, eq. 8, as in TRL 1.16.
    """
    z = baseline.detach() if isinstance(baseline, torch.Tensor) else baseline
    return _unpaired(scores - z, grades, list_mask, desirable_weight, undesirable_weight)


@OBJECTIVE.add
class Kto(Objective):
    """KTO, for completions that are good or bad by themselves."""

    formula = staticmethod(kto)
    properties = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, min_list_size=1)
    trl = {"kto": "{objective: {name: kto}}"}

    name: Literal["kto"] = "kto"
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable completions."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable completions."""


def apo_zero_unpaired(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """APO-zero for single completions: KTO with baseline zero.

    desirable: w_d (1 - sigmoid(s));  undesirable: w_u sigmoid(s)

    Args:
        scores, list_mask: see the module.
        grades: above one half is desirable.
        desirable_weight: w_d.
        undesirable_weight: w_u.

    Returns:
        One loss per list, in units of probability.

    Source: APO, arXiv:2408.06266, unpaired form of eq. 7, as in TRL 1.16.
    """
    return _unpaired(scores, grades, list_mask, desirable_weight, undesirable_weight)


@OBJECTIVE.add
class ApoZeroUnpaired(Objective):
    """APO-zero for single completions."""

    formula = staticmethod(apo_zero_unpaired)
    properties = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, min_list_size=1)
    trl = {"apo_zero_unpaired": "{objective: {name: apo_zero_unpaired}}"}

    name: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable completions."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable completions."""


def sft(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    ties: str = "mean",
) -> Float[Tensor, " B"]:
    """The likelihood term: minus the score of the best-graded completion.

    -mean of s over the completions with the highest grade

    Args:
        scores: mean log-probability of a token (`likelihood_mean` with beta 1; a recipe gives that by default).
        grades, list_mask: see the module.
        ties: "first" takes the first of several best completions in the order of the row.

    Returns:
        One loss per list, in nats; for a list of ties the mean over the whole list.

    Source: RPO, arXiv:2404.19733. TRL averages over the tokens of all best completions of a micro-batch; here every
    list counts the same. RRHF, arXiv:2304.05302, and Rescue, arXiv:2311.09136 (authors' code): the first.
    """
    best = best_graded(grades, list_mask)
    return -masked_mean(scores, best & (best.cumsum(dim=1) == 1) if ties == "first" else best)


@OBJECTIVE.add
class Sft(Objective):
    """Next-token loss of the best completion, beside another objective (RPO)."""

    formula = staticmethod(sft)
    properties = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, min_list_size=1)
    trl = {"sft": "{objective: {name: sft}}"}

    name: Literal["sft"] = "sft"
    ties: Literal["mean", "first"] = "mean"
    """Several best completions: their mean, or the first of the row (RRHF and Rescue)."""
    score: ScoreConfig | None = LikelihoodMean(beta=1.0)
    """Mean log-probability of a token; null takes the recipe's score."""


def _unpaired(
    advantage: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    desirable_weight: float,
    undesirable_weight: float,
) -> Float[Tensor, " B"]:
    advantage = advantage.masked_fill(~list_mask, 0)
    desirable = desirable_weight * (-advantage).sigmoid()
    undesirable = undesirable_weight * advantage.sigmoid()
    return masked_sum(desirable.where(grades > 0.5, undesirable), list_mask)
