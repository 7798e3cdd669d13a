"""AFT: one log-sum-exp over all pairs of a list, with a floor under how far the worse completions may fall."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, model_validator

from align.objectives.base import Properties
from align.objectives.lists import chosen_and_rejected, ordered_pairs, per_pair
from align.objectives.objective import OBJECTIVE, Objective
from align.objectives.scores import LikelihoodMean, ScoreConfig
from align.tensors import Bool, Float, Tensor, torch

Variant = Literal["plain", "detached", "boundary", "ranking"]


def aft(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    variant: Variant = "ranking",
    margin: float = 0.1,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """AFT's alignment term; combine it with `sft`.

    plain:    log(1 + sum_ij e^{s_j - s_i})
    detached: the same, no gradient reaches s_j
    boundary, ranking: log(1 + sum_ij [e^{s_j - s_i} + e^{T_j - s_j}]),  T_j = sg(min over i of s_i) - 2 margin

    The sums run over the pairs (i, j) of a best-graded and another completion; for `ranking` over all with g_i > g_j.
    Where a row has a margin m, s_j + m stands for s_j: the worse completion is pushed m further down.

    Args:
        scores: mean log-probabilities of a token (`likelihood_mean` with beta 1; a recipe gives that by default).
        grades: larger is better; a tie forms no pair.
        list_mask: False marks padding, whose score and grade may hold anything, even NaN.
        variant: which of the four.
        margin: how far a worse completion is pushed below the better one, in nats; with a single better one the push
            ends there. Not used by `plain` and `detached`.
        margins: m, one per list, in nats; None for 0.

    Returns:
        One loss per list, in nats; 0 with zero gradient for a list of ties.

    Source: AFT, arXiv:2309.02144; the exact forms could not be read and are reconstructed: ours.
    """
    pairs = ordered_pairs(grades, list_mask)
    if variant != "ranking":
        chosen, rejected = chosen_and_rejected(grades, list_mask)
        pairs = chosen[:, :, None] & rejected[:, None, :]
    scores = scores.masked_fill(~list_mask, 0)
    better_by = per_pair(margins, scores)
    worse = scores.detach() if variant == "detached" else scores
    terms = [(worse[:, None, :] - scores[:, :, None] + better_by).masked_fill(~pairs, -torch.inf)]
    if variant in ("boundary", "ranking"):
        better = scores.detach()[:, :, None].expand_as(pairs).masked_fill(~pairs, torch.inf)
        floor = (better.amin(dim=1) - 2 * margin - scores)[:, None, :].expand_as(pairs)
        terms.append((floor - better_by).masked_fill(~pairs, -torch.inf))
    one = scores.new_zeros(scores.shape[0], 1)
    return torch.cat([one, *(term.flatten(start_dim=1) for term in terms)], dim=1).logsumexp(dim=1)


@OBJECTIVE.add
class Aft(Objective):
    """AFT's alignment term."""

    formula = staticmethod(aft)
    properties = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False)

    name: Literal["aft"] = "aft"
    variant: Variant = "ranking"
    """`plain`, or one of three ways to keep the worse completions from falling without end."""
    margin: PositiveFloat = 0.1
    """How far a worse completion is pushed below the better one, in nats per token; `boundary` and `ranking` only."""
    score: ScoreConfig | None = LikelihoodMean(beta=1.0)
    """Mean log-probability of a token; null takes the recipe's score."""

    @model_validator(mode="after")
    def _margin_counts(self) -> Aft:
        if self.margin != 0.1 and self.variant in ("plain", "detached"):
            raise ValueError(f"margin: `{self.variant}` has none; remove it, or take `boundary` or `ranking`")
        return self
