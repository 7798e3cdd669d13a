"""LiPO-lambda: the logistic loss per ordered pair, weighted by what swapping the two would change in the DCG."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from align.objectives.base import Properties
from align.objectives.lists import differences, ordered_pairs, per_pair
from align.objectives.noise import settled
from align.objectives.objective import OBJECTIVE, Objective
from align.tensors import Bool, F, Float, Tensor, torch

Reduction = Literal["list_sum", "list_mean", "pair_mean"]


def lambda_loss(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    log_base: float = 2.0,
    reduction: Reduction = "list_sum",
    noise: Float[Tensor, "B K"] | None = None,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """LiPO-lambda: getting the top of the list right counts more than its tail.

    sum over g_i > g_j of Delta_ij log(1 + e^{-(s_i - s_j - m)}),  Delta as in `lambda_weights`

    Args:
        scores: s in nats, beta included.
        grades: g, larger is better; a tie forms no pair.
        list_mask: False marks padding, whose score and grade may hold anything, even NaN.
        log_base: of the discount; 2 is what rax does, e the natural logarithm.
        reduction: the sum over pairs, or that divided by the list's completions, or by its ordered pairs.
        noise: how far each score may be off by rounding; see `align.objectives.noise.settled`.
        margins: m, how far apart each list's pairs should score, in the unit of s; None for 0.

    Returns:
        One loss per list, in nats times DCG gain; 0 with zero gradient for a list of ties.

    Source: LiPO, arXiv:2402.01878, eqs. 7 and 8. (rax multiplies by the padded width and averages over all pairs of the
    batch, which is no function of one list.)
    """
    weights = lambda_weights(scores, grades, list_mask, log_base=log_base, reduction=reduction, noise=noise)
    gaps = differences(scores) - per_pair(margins, scores)
    return (weights * F.softplus(-gaps.masked_fill(~ordered_pairs(grades, list_mask), 0))).sum(dim=(1, 2))


def lambda_weights(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    log_base: float = 2.0,
    reduction: Reduction = "list_sum",
    noise: Float[Tensor, "B K"] | None = None,
) -> Float[Tensor, "B K K"]:
    """Delta: how much the DCG would change if the two completions of a pair swapped their ranks; no gradient.

    Delta_ij = |2^{g_i} - 2^{g_j}| * |1 / log(1 + rank_i) - 1 / log(1 + rank_j)| where g_i > g_j, else 0

    rank is 1-based, by the current scores, descending. Where scores are tied, but for noise, the second factor is its
    mean over all orders of the tied completions, so the order of the row does not matter, not even before the first
    step.

    Args:
        scores, grades, list_mask, log_base, reduction, noise: as for `lambda_loss`.

    Returns:
        The weight of each pair (i better, j worse).

    Source: LiPO, arXiv:2402.01878, eq. 8; the mean over tied scores: ours.
    """
    pairs = ordered_pairs(grades, list_mask)
    gain_gap = differences(torch.exp2(grades)).masked_fill(~pairs, 0).to(scores.dtype)
    weights = gain_gap * _discount_gap(settled(scores, list_mask, noise), list_mask, log_base)
    if reduction == "list_mean":
        weights = weights / list_mask.sum(dim=1).clamp(min=1)[:, None, None]
    elif reduction == "pair_mean":
        weights = weights / pairs.sum(dim=(1, 2)).clamp(min=1)[:, None, None]
    return weights


@OBJECTIVE.add
class Lambda(Objective):
    """LiPO-lambda."""

    formula = staticmethod(lambda_loss)
    properties = Properties(
        shift_invariant=True, zero_when_tied=True, dpo_at_two=True, grades="exponent", of_rewards=True
    )
    pair_weights = staticmethod(lambda_weights)

    name: Literal["lambda"] = "lambda"
    log_base: Annotated[float, Field(gt=1)] = 2.0
    """Of the rank discount."""
    reduction: Reduction = "list_sum"
    """Sum over a list's pairs, or that per completion, or per ordered pair."""


def _discount_gap(
    scores: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"], log_base: float
) -> Float[Tensor, "B K K"]:
    """|1/D(rank_i) - 1/D(rank_j)|, its mean over the orders of tied scores."""
    scores = scores.masked_fill(~list_mask, -torch.inf)
    zero_based_rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    discount = torch.log(scores.new_tensor(log_base)) / torch.log(zero_based_rank.to(scores.dtype) + 2)
    tied = (scores[:, :, None] == scores[:, None, :]).to(scores.dtype)
    size = tied.sum(dim=2)
    mean_discount = _apply(tied, discount) / size
    inner_gaps = _apply(tied, (tied * differences(discount).abs()).sum(dim=2)) / (size * (size - 1)).clamp(min=1)
    return torch.where(tied > 0, inner_gaps[:, :, None], differences(mean_discount).abs())


def _apply(matrix: Float[Tensor, "B K K"], vector: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    return (matrix * vector[:, None, :]).sum(dim=2)
