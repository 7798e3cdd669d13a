"""Objectives on a whole list: Plackett-Luce, cross-entropy and reverse KL.

Arguments: scores s in nats (beta included), grades g (larger is better), list_mask (False marks padding, whose score
and grade may hold anything, even NaN), margins m (one per list, by which a better completion should lead, in the unit
of the scores; None where rows have none).
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from align.objectives.base import Properties
from align.objectives.lists import masked_sum, ordered_pairs, per_pair
from align.objectives.objective import OBJECTIVE, Objective
from align.tensors import Bool, Float, Tensor, torch


def list_mle(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """ListMLE, DPO's Plackett-Luce form, PRO: minus the log-probability of the order that the grades give.

    -sum_k log( e^{s_k} / (e^{s_k} + sum over g_j < g_k of e^{s_j + m}) ),  m = margin, else 0

    Without ties the denominator is the usual sum over k and everything ranked after it. Completions with equal grades
    do not compete with one another, so no order among them is made up and the order of the row does not matter.

    Args:
        scores, grades, list_mask, margins: see the module.

    Returns:
        One loss per list, in nats; 0 with zero gradient for a list of ties.

    Source: LiPO, arXiv:2402.01878, section 3 (DPO_PL, arXiv:2305.18290, eq. 18); ties and the margin: ours.
    """
    scores = scores.masked_fill(~list_mask, 0)
    worse = ordered_pairs(grades, list_mask)
    self_or_worse = worse | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    competitors = _competitors(scores, worse, margins).masked_fill(~self_or_worse, -torch.inf)
    return masked_sum(competitors.logsumexp(dim=2) - scores, list_mask)


@OBJECTIVE.add
class ListMle(Objective):
    """Plackett-Luce likelihood of the order."""

    formula = staticmethod(list_mle)
    properties = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=True, of_rewards=True)

    name: Literal["list_mle"] = "list_mle"


def softmax(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """ListNet, InfoNCA: cross-entropy between the normalised grades and the softmax of the scores.

    -sum_j (g_j / sum_k g_k) log softmax(s)_j
    with a margin m, the denominator of softmax(s)_j has e^{s_k + m} for every k that is worse than j

    Args:
        scores, list_mask, margins: see the module.
        grades: at least 0.

    Returns:
        One loss per list, in nats; 0 with zero gradient where all grades are 0.

    Source: LiPO, arXiv:2402.01878, section 3; InfoNCA, arXiv:2402.05369; the margin: ours.
    """
    grades = grades.masked_fill(~list_mask, 0)
    total = grades.sum(dim=1, keepdim=True)
    weights = (grades / total.masked_fill(total == 0, 1)).to(scores.dtype)
    if margins is None:
        return -(weights * _log_softmax(scores, list_mask)).sum(dim=1)
    scores = scores.masked_fill(~list_mask, 0)
    competitors = _competitors(scores, ordered_pairs(grades, list_mask), margins)
    total_mass = competitors.masked_fill(~list_mask[:, None, :], -torch.inf).logsumexp(dim=2)
    return masked_sum(weights * (total_mass - scores).masked_fill(~list_mask, 0), list_mask)


@OBJECTIVE.add
class Softmax(Objective):
    """Cross-entropy of the normalised grades (ListNet, InfoNCA)."""

    formula = staticmethod(softmax)
    properties = Properties(
        shift_invariant=True, zero_when_tied=False, dpo_at_two=False, grades="nonnegative", of_rewards=True
    )

    name: Literal["softmax"] = "softmax"


def exo_list(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " B"]:
    """EXO on a list: the reverse KL from the softmax of the scores to that of the grades.

    sum_i q_i (log q_i - log p_i),  q = softmax(s),  p = softmax(g / temperature)

    Args:
        scores, grades, list_mask: see the module.
        temperature: of the target; smaller trusts the grades more.

    Returns:
        One loss per list, in nats; 0 where the scores differ as the tempered grades do.

    Source: EXO, arXiv:2402.00856; grades as the target's scores: ours.
    """
    log_q = _log_softmax(scores, list_mask)
    log_p = _log_softmax(grades / temperature, list_mask).to(scores.dtype)
    return masked_sum(log_q.exp() * (log_q - log_p), list_mask)


@OBJECTIVE.add
class ExoList(Objective):
    """Reverse KL to the softmax of the grades."""

    formula = staticmethod(exo_list)
    properties = Properties(shift_invariant=True, zero_when_tied=False, dpo_at_two=False, of_rewards=True)

    name: Literal["exo_list"] = "exo_list"
    temperature: PositiveFloat = 1.0
    """Of the target softmax(grades / temperature); smaller trusts the grades more."""


def _competitors(
    scores: Float[Tensor, "B K"], worse: Bool[Tensor, "B K K"], margins: Float[Tensor, " B"] | None
) -> Float[Tensor, "B K K"]:
    """At (i, j) the score of j as i has to beat it: more by the margin where j is worse."""
    if margins is None:
        return scores[:, None, :].expand_as(worse)
    return scores[:, None, :] + worse * per_pair(margins, scores)


def _log_softmax(x: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """log softmax over the real completions; 0 on padding."""
    return x.masked_fill(~list_mask, -torch.inf).log_softmax(dim=1).masked_fill(~list_mask, 0)
