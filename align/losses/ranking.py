"""How well scores rank the completions of a list against its grades, with ties treated fairly.

A list with nothing to order (fewer than two completions, or all grades equal) gets NaN, so that the caller can count it
and leave it out of the mean. list_mask False marks padding, whose score and grade may hold anything, even NaN.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.objectives.noise import settled


def ranking_metrics(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    k: int | None = None,
    noise: Float[Tensor, "B K"] | None = None,
) -> dict[str, Float[Tensor, " B"]]:
    """All ranking figures of each list.

    Args:
        scores: what ranks the completions; a difference that rounding explains is a tie.
        grades: what they should be ranked by, larger is better.
        list_mask: False marks padding.
        k: NDCG counts this many first ranks; None counts all.
        noise: how far each score may be off by rounding; see `align.objectives.noise.settled`.

    Returns:
        pair_accuracy, ndcg, kendall_tau, top1_agreement and margin, one value per list; NaN where there is nothing to
        order.

    Source: ours; the parts name theirs.
    """
    ranked = settled(scores, list_mask, noise)
    metrics = {
        "pair_accuracy": pair_accuracy(ranked, grades, list_mask),
        "ndcg": ndcg(ranked, grades, list_mask, k=k),
        "kendall_tau": kendall_tau(ranked, grades, list_mask),
        "top1_agreement": top1_agreement(ranked, grades, list_mask),
        "margin": margin(scores, grades, list_mask),
    }
    nothing_to_order = ~_better(grades, list_mask).any(dim=2).any(dim=1)
    return {name: values.masked_fill(nothing_to_order, torch.nan) for name, values in metrics.items()}


def pair_accuracy(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Share of the pairs with g_i > g_j that the scores order the same way; tied scores count one half.

    Args:
        scores, grades, list_mask: see `ranking_metrics`.

    Returns:
        One share per list; NaN without a pair.

    Source: ours.
    """
    pairs = _better(grades, list_mask)
    agree = (_better(scores, list_mask) & pairs).sum(dim=(1, 2))
    disagree = (_better(scores, list_mask).transpose(1, 2) & pairs).sum(dim=(1, 2))
    total = pairs.sum(dim=(1, 2)).to(scores.dtype)
    return (agree + (total - agree - disagree) / 2) / total


def ndcg(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"], *, k: int | None = None
) -> Float[Tensor, " B"]:
    """Normalised discounted cumulative gain, its mean over all orders of tied scores.

    sum over ranks r <= k of (2^g - 1) / log2(1 + r), divided by the same in the order of the grades

    Args:
        scores, list_mask: see `ranking_metrics`.
        grades: below 0 they are shifted per list so that the lowest is 0.
        k: ranks that count; None counts all.

    Returns:
        One value per list, at most 1; 1 where no completion has a gain.

    Source: Jarvelin and Kekalainen 2002, gain 2^g - 1; mean over ties: McSherry and Najork 2008.
    """
    grades = grades.masked_fill(~list_mask, 0)
    grades = grades - grades.amin(dim=1, keepdim=True).clamp(max=0)
    highest = grades.amax(dim=1, keepdim=True)  # the ratio is of gains / 2^highest, which no grade can make infinite
    gains = (torch.exp2(grades - highest) - torch.exp2(-highest)).masked_fill(~list_mask, 0).to(scores.dtype)
    scores = scores.masked_fill(~list_mask, -torch.inf)
    discount = _discounts(scores, k)
    tied = (scores[:, :, None] == scores[:, None, :]).to(scores.dtype)
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    fair = (tied * discount[rank][:, None, :]).sum(dim=2) / tied.sum(dim=2)
    ideal = (gains.sort(dim=1, descending=True).values * discount).sum(dim=1)
    return ((gains * fair).sum(dim=1) / ideal).masked_fill(ideal == 0, 1.0)


def kendall_tau(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Kendall's tau-b between scores and grades.

    (concordant - discordant) / sqrt(pairs untied in score * pairs untied in grade)

    Args:
        scores, grades, list_mask: see `ranking_metrics`.

    Returns:
        One value per list in [-1, 1]; 0 where all scores or all grades are tied.

    Source: Kendall 1945.
    """
    by_score, by_grade = _better(scores, list_mask), _better(grades, list_mask)
    concordant = (by_score & by_grade).sum(dim=(1, 2))
    discordant = (by_score & by_grade.transpose(1, 2)).sum(dim=(1, 2))
    untied = by_score.sum(dim=(1, 2)).to(scores.dtype) * by_grade.sum(dim=(1, 2))
    return (concordant - discordant) / untied.masked_fill(untied == 0, 1).sqrt()


def top1_agreement(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Chance that a completion drawn from those with the highest score has the highest grade.

    Args:
        scores, grades, list_mask: see `ranking_metrics`.

    Returns:
        One share per list; NaN for an empty list.

    Source: ours.
    """
    first, best = _highest(scores, list_mask), _highest(grades, list_mask)
    return (first & best).sum(dim=1).to(scores.dtype) / first.sum(dim=1)


def margin(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """Mean score of the best-graded completions minus that of the worst-graded.

    Args:
        scores, grades, list_mask: see `ranking_metrics`.

    Returns:
        One difference per list, in the unit of the scores; 0 for a list of ties.

    Source: ours.
    """
    return _mean(scores, _highest(grades, list_mask)) - _mean(scores, _highest(-grades, list_mask))


def _better(x: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K K"]:
    """True at (i, j) where both are real and x_i > x_j."""
    return (x[:, :, None] > x[:, None, :]) & list_mask[:, :, None] & list_mask[:, None, :]


def _highest(x: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
    return list_mask & (x == x.masked_fill(~list_mask, -torch.inf).amax(dim=1, keepdim=True))


def _mean(x: Float[Tensor, "B K"], where: Bool[Tensor, "B K"]) -> Float[Tensor, " B"]:
    return x.masked_fill(~where, 0).sum(dim=1) / where.sum(dim=1)


def _discounts(scores: Float[Tensor, "B K"], k: int | None) -> Float[Tensor, " K"]:
    """1 / log2(1 + rank) by zero-based rank; 0 beyond k."""
    places: Int[Tensor, " K"] = torch.arange(scores.shape[1], device=scores.device)
    discounts = 1 / torch.log2(places.to(scores.dtype) + 2)
    return discounts if k is None else discounts.masked_fill(places >= k, 0)
