"""The spherical Z-loss: a list's scores count by where they stand among the list's, not by their size."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from align.objectives.base import Properties
from align.objectives.lists import masked_mean, masked_sum, shares
from align.objectives.objective import OBJECTIVE, Objective
from align.objectives.scores import LikelihoodMean
from align.tensors import Bool, F, Float, Tensor


def spherical(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    slope: float = 1.0,
    target: float = 1.0,
) -> Float[Tensor, " B"]:
    """The Z-loss of 2016, over the completions of a list; no relative of the penalty on log^2 Z (`z_penalty`).

    sum_j (g_j / sum_i g_i) softplus(slope (target - z_j)) / slope,  z = (s - mean(s)) / std(s), std over K

    Neither a shift nor a positive factor of the scores changes it, beta among them. Two scores have the same z whatever
    they are, and equal ones none: it takes lists of three, and scores that differ before training.

    Args:
        scores: s.
        grades: g, at least 0.
        list_mask: False marks padding, which may hold anything.
        slope: a of the paper; the larger, the less a completion counts that is above the target.
        target: b of the paper: how far above the mean, in standard deviations, a good completion should be.

    Returns:
        One loss per list; 0 with zero gradient where all grades are 0, without gradient where all scores are equal.

    Source: arXiv:1604.08859; lists, and grades as weights: ours.
    """
    weights = shares(grades.masked_fill(~list_mask, 0)).to(scores.dtype)
    scores = scores.masked_fill(~list_mask, 0)
    centred = (scores - masked_mean(scores, list_mask)[:, None]).masked_fill(~list_mask, 0)
    variance = masked_mean(centred**2, list_mask)[:, None]
    z = centred / variance.masked_fill(variance == 0, 1).sqrt()
    return masked_sum(weights * F.softplus(slope * (target - z)) / slope, list_mask)


@OBJECTIVE.add
class Spherical(Objective):
    """Good completions stand out in a list by standard deviations (spherical Z-loss)."""

    formula = staticmethod(spherical)
    properties = Properties(
        shift_invariant=True,
        zero_when_tied=False,
        dpo_at_two=False,
        min_list_size=3,
        grades="nonnegative",
        score="likelihood_mean",
        of_rewards=True,
    )

    name: Literal["spherical"] = "spherical"
    score: LikelihoodMean = LikelihoodMean(beta=1.0)
    """Against a reference all scores would be 0 before training, and have no order."""
    slope: PositiveFloat = 1.0
    """The larger, the less a completion counts that is above the target."""
    target: PositiveFloat = 1.0
    """How many standard deviations above the list's mean a good completion should score."""
