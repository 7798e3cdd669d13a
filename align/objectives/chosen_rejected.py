"""Objectives that push the chosen completions up and the rejected ones down, each on its own.

Chosen are the completions with the list's best grade, rejected all others; on a list of two these are the pair losses
of the papers, with a = score of the chosen, b = score of the rejected. Arguments: scores s in nats (beta included),
grades g (larger is better), list_mask (False marks padding, whose score and grade may hold anything, even NaN).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from align.objectives.base import Properties
from align.objectives.lists import best_graded, chosen_and_rejected, masked_mean, masked_sum, over_ordered_pairs
from align.objectives.objective import OBJECTIVE, Objective
from align.tensors import Bool, F, Float, Tensor


def nca(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    temperature: float = 0.0,
) -> Float[Tensor, " B"]:
    """NCA: every score is held down a little, the good ones are pushed up.

    -sum_i [w_i log sigmoid(s_i) + (1 / K) log sigmoid(-s_i)],  w = softmax(g / temperature)
    on two: -log sigmoid(a) - 1/2 log sigmoid(-a) - 1/2 log sigmoid(-b)

    Args:
        scores, grades, list_mask: see the module.
        temperature: of the target weights; 0 gives all weight to the best grade, ties sharing it.

    Returns:
        One loss per list, in nats.

    Source: NCA, arXiv:2402.05369 (published notes), the form on two as in TRL 1.16.
    """
    scores = scores.masked_fill(~list_mask, 0)
    targets = _targets(grades, list_mask, temperature).to(scores.dtype)
    pushed_up = masked_sum(targets * F.logsigmoid(scores), list_mask)
    return -pushed_up - masked_mean(F.logsigmoid(-scores), list_mask)


@OBJECTIVE.add
class Nca(Objective):
    """NCA."""

    formula = staticmethod(nca)
    properties = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False)
    trl = {"nca_pair": "{objective: {name: nca}}"}

    name: Literal["nca"] = "nca"
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the target weights softmax(grades / temperature); 0 gives all weight to the best grade."""


def bco(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """BCO: a binary classifier of chosen against rejected, without the running shift of the reward.

    -mean over chosen of log sigmoid(s) - mean over rejected of log sigmoid(-s)

    Args:
        scores, grades, list_mask: see the module.

    Returns:
        One loss per list, in nats; 0 with zero gradient for a list of ties.

    Source: BCO, arXiv:2404.04656, on two as in TRL 1.16; means for longer lists: ours.
    """
    chosen, rejected = chosen_and_rejected(grades, list_mask)
    scores = scores.masked_fill(~list_mask, 0)
    return -masked_mean(F.logsigmoid(scores), chosen) - masked_mean(F.logsigmoid(-scores), rejected)


@OBJECTIVE.add
class Bco(Objective):
    """BCO without the running shift of the reward."""

    formula = staticmethod(bco)
    properties = Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False)
    trl = {"bco_pair": "{objective: {name: bco}}"}

    name: Literal["bco"] = "bco"


def sppo(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"], *, beta: float
) -> Float[Tensor, " B"]:
    """SPPO: the unscaled log-ratio is regressed to the centred win probability.

    sum_i (s_i / beta - (g_i - 1/2) / beta)^2
    on two with g = (1, 0): (a / beta - 1 / (2 beta))^2 + (b / beta + 1 / (2 beta))^2

    Args:
        scores, list_mask: see the module.
        grades: mean win probabilities, in [0, 1].
        beta: the factor that is in the scores; it is divided out.

    Returns:
        One loss per list, in squared nats.

    Source: SPPO, arXiv:2405.00675, eq. 4.7, on two as TRL 1.16's `sppo_hard`; whole lists: ours.
    """
    scores = scores.masked_fill(~list_mask, 0)
    grades = grades.masked_fill(~list_mask, 0).to(scores.dtype)
    return masked_sum(((scores - grades + 0.5) / beta).square(), list_mask)


@OBJECTIVE.add
class Sppo(Objective):
    """SPPO; grades are win probabilities."""

    formula = staticmethod(sppo)
    properties = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, grades="unit")
    trl = {"sppo_hard": "{objective: {name: sppo}}"}

    name: Literal["sppo"] = "sppo"


def apo_zero(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """APO-zero: chosen up, rejected down, for data better than what the policy writes.

    mean over chosen of (1 - sigmoid(s)) + mean over rejected of sigmoid(s)

    Args:
        scores, grades, list_mask: see the module.

    Returns:
        One loss per list, in units of probability; 0 with zero gradient for a list of ties.

    Source: APO, arXiv:2408.06266, eq. 7; means for longer lists: ours.
    """
    chosen, rejected = chosen_and_rejected(grades, list_mask)
    scores = scores.masked_fill(~list_mask, 0)
    return masked_mean((-scores).sigmoid(), chosen) + masked_mean(scores.sigmoid(), rejected)


@OBJECTIVE.add
class ApoZero(Objective):
    """APO-zero."""

    formula = staticmethod(apo_zero)
    properties = Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False)
    trl = {"apo_zero": "{objective: {name: apo_zero}}"}

    name: Literal["apo_zero"] = "apo_zero"


def apo_down(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """APO-down, pairs only: both down, the rejected further, for data worse than what the policy writes.

    sigmoid(a) + 1 - sigmoid(a - b - m)

    Args:
        scores, grades, list_mask: see the module; two completions per list.
        margins: m, how far apart each list's pair should score, in the unit of the scores; None for 0.

    Returns:
        One loss per list, in units of probability; 0 with zero gradient for a tie.

    Source: APO, arXiv:2408.06266, eq. 8.
    """
    chosen, _ = chosen_and_rejected(grades, list_mask)
    held_down = masked_mean(scores.masked_fill(~list_mask, 0).sigmoid(), chosen)
    return held_down + over_ordered_pairs(lambda d: (-d).sigmoid(), scores, grades, list_mask, margins)


@OBJECTIVE.add
class ApoDown(Objective):
    """APO-down; pairs only."""

    formula = staticmethod(apo_down)
    properties = Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False, max_list_size=2)
    trl = {"apo_down": "{objective: {name: apo_down}}"}

    name: Literal["apo_down"] = "apo_down"


def _targets(grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"], temperature: float) -> Float[Tensor, "B K"]:
    if temperature == 0:
        best = best_graded(grades, list_mask)
        return best / best.sum(dim=1, keepdim=True).clamp(min=1)
    return (grades / temperature).masked_fill(~list_mask, float("-inf")).softmax(dim=1)
