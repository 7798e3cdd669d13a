"""Objectives on a whole list: Plackett-Luce, cross-entropy, reverse KL and a soft top k.

Arguments: scores s in nats (beta included), grades g (larger is better), list_mask (False marks padding, whose score
and grade may hold anything, even NaN), margins m (one per list, by which a better completion should lead, in the unit
of the scores; None where rows have none).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from align.objectives.base import Properties
from align.objectives.lists import differences, masked_sum, ordered_pairs, per_pair, shares
from align.objectives.objective import OBJECTIVE, Objective
from align.tensors import Bool, F, Float, Tensor, torch


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
    return masked_sum(_against_worse(scores, ordered_pairs(grades, list_mask), list_mask, margins), list_mask)


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
    normaliser: Literal["softmax", "stablemax", "softplus"] = "softmax",
    k: int | None = None,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """ListNet, InfoNCA: cross-entropy between the normalised grades and the softmax of the scores.

    -sum_j (g_j / sum_k g_k) log( f(s_j) / sum_k f(s_k) )
    f(s) = e^s; stablemax: 1 + s, below 0 1 / (1 - s); softplus: log(1 + e^s)
    with k, the sum is over the k highest scores (all that reach the kth) and every g_k > 0
    with a margin m, f(s_j)'s denominator has f(s_k + m) for every k that is worse than j

    Args:
        scores, list_mask, margins: see the module.
        grades: at least 0.
        normaliser: what f is. The others than e^s do not saturate: a list that is won by far still teaches.
        k: how many compete; the others neither share the mass nor are pushed down.

    Returns:
        One loss per list, in nats; 0 with zero gradient where all grades are 0.

    Source: LiPO, arXiv:2402.01878, section 3; InfoNCA, arXiv:2402.05369; stablemax: arXiv:2501.04697; softplus with a
        sum for its norm: arXiv:2501.13428; k: sparse-softmax, arXiv:2112.12433; all over lists, and the margin: ours.
    """
    grades, scores = grades.masked_fill(~list_mask, 0), scores.masked_fill(~list_mask, 0)
    if k is not None and k < scores.shape[1]:
        list_mask = list_mask & ((grades > 0) | (scores >= _kth(scores, list_mask, k)))
    log_f = LOG_F[normaliser]
    weights = shares(grades).to(scores.dtype)
    if margins is None:
        return -(weights * _log_softmax(log_f(scores), list_mask)).sum(dim=1)
    competitors = log_f(_competitors(scores, ordered_pairs(grades, list_mask), margins))
    total_mass = competitors.masked_fill(~list_mask[:, None, :], -torch.inf).logsumexp(dim=2)
    return masked_sum(weights * (total_mass - log_f(scores)).masked_fill(~list_mask, 0), list_mask)


@OBJECTIVE.add
class Softmax(Objective):
    """Cross-entropy of the normalised grades (ListNet, InfoNCA)."""

    formula = staticmethod(softmax)
    properties = Properties(
        shift_invariant=True, zero_when_tied=False, dpo_at_two=False, grades="nonnegative", of_rewards=True
    )

    name: Literal["softmax"] = "softmax"
    normaliser: Literal["softmax", "stablemax", "softplus"] = "softmax"
    """What makes shares of the scores; `stablemax` and `softplus` grow as a score does, not as its exponential."""
    k: PositiveInt | None = None
    """Only the k highest scores, and the good completions, compete (sparse-softmax); by default all."""

    @property
    def holds(self) -> Properties:
        """Only of exponentials a shift cancels."""
        return replace(self.properties, shift_invariant=self.normaliser == "softmax")


def decoupled_softmax(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    negatives: Literal["equal", "grades"] = "equal",
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """The decoupled softmax: good completions do not compete with one another, each with the worse ones alone.

    -sum_j g_j log( e^{s_j} / (e^{s_j} + sum over g_k < g_j of w_jk e^{s_k + m}) ),  m = margin, else 0
    w_jk = 1 or, with `negatives: grades`, g_j - g_k over its mean: what is nearly as good counts less as a negative

    Args:
        scores, list_mask, margins: see the module.
        grades: at least 0.
        negatives: what weighs them.

    Returns:
        One loss per list, in nats; 0 with zero gradient for a list of ties.

    Source: arXiv:2310.10636 for grades of 0 and 1; weights on negatives: Soft-InfoNCE,
    arXiv:2310.08069; more grades, their differences as weights, and the margin: ours.
    """
    worse = ordered_pairs(grades, list_mask)
    log_weights = _log_gaps(grades, worse).to(scores.dtype) if negatives == "grades" else None
    terms = _against_worse(scores, worse, list_mask, margins, log_weights)
    return masked_sum(grades.to(scores.dtype) * terms, list_mask)


@OBJECTIVE.add
class DecoupledSoftmax(Objective):
    """Each good completion against the worse ones alone."""

    formula = staticmethod(decoupled_softmax)
    properties = Properties(
        shift_invariant=True, zero_when_tied=True, dpo_at_two=True, grades="nonnegative", of_rewards=True
    )

    name: Literal["decoupled_softmax"] = "decoupled_softmax"
    negatives: Literal["equal", "grades"] = "equal"
    """What weighs the worse completions: nothing, or by how much their grade is less."""


def soft_top_k(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    k: int = 1,
    temperature: float = 1.0,
) -> Float[Tensor, " B"]:
    """The good completions belong among the k of the highest scores, in whatever order.

    -sum_j (g_j / sum_i g_i) log z_j,  z_j = sigmoid((s_j - t) / temperature),  t such that sum_j z_j = k

    Args:
        scores, list_mask: see the module.
        grades: at least 0.
        k: how many places there are.
        temperature: towards 0, z is 1 for the k highest scores and 0 for the others.

    Returns:
        One loss per list, in nats; 0 with zero gradient where all grades are 0, or the list is no longer than k.

    Source: arXiv:2310.10636; grades that are not 0 or 1: ours.
    """
    longer = list_mask.sum(dim=1, keepdim=True) > k
    mask = list_mask & longer
    scaled = scores.masked_fill(~mask, 0) / temperature
    weights = shares(grades.masked_fill(~mask, 0)).to(scores.dtype)
    return masked_sum(-weights * F.logsigmoid(scaled - _threshold(scaled, mask, k)), mask)


@OBJECTIVE.add
class SoftTopK(Objective):
    """Good completions among the k of the highest scores."""

    formula = staticmethod(soft_top_k)
    properties = Properties(
        shift_invariant=True, zero_when_tied=False, dpo_at_two=False, grades="nonnegative", of_rewards=True
    )

    name: Literal["soft_top_k"] = "soft_top_k"
    k: PositiveInt = 1
    """How many places there are; a list that is no longer teaches nothing."""
    temperature: PositiveFloat = 1.0
    """Towards 0, the k highest scores count as 1 and all others as 0."""


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


def _kth(scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], k: int) -> Float[Tensor, "B 1"]:
    """The kth highest score of each list; -inf where it has fewer."""
    return scores.detach().masked_fill(~mask, -torch.inf).topk(k, dim=1).values[:, -1:]


def _log_stablemax(x: Tensor) -> Tensor:
    """Of each side its own part, since a sign times log(1 + |x|) would have no gradient at 0, where training begins."""
    return torch.where(x >= 0, x.clamp(min=0).log1p(), -(-x.clamp(max=0)).log1p())


def _log_softplus(x: Tensor) -> Tensor:
    """Far below 0 it is x, where float32's softplus would be 0."""
    return torch.where(x < LOW, x, F.softplus(x.clamp(min=LOW)).log())


LOW = -40.0
LOG_F: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x,
    "stablemax": _log_stablemax,
    "softplus": _log_softplus,
}


def _against_worse(
    scores: Float[Tensor, "B K"],
    worse: Bool[Tensor, "B K K"],
    list_mask: Bool[Tensor, "B K"],
    margins: Float[Tensor, " B"] | None,
    log_weights: Float[Tensor, "B K K"] | None = None,
) -> Float[Tensor, "B K"]:
    """Minus the log-probability of each completion among itself and the worse ones; 0 on padding."""
    scores = scores.masked_fill(~list_mask, 0)
    self_or_worse = worse | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    competitors = _competitors(scores, worse, margins) + (0 if log_weights is None else log_weights)
    return competitors.masked_fill(~self_or_worse, -torch.inf).logsumexp(dim=2) - scores


def _log_gaps(grades: Float[Tensor, "B K"], worse: Bool[Tensor, "B K K"]) -> Float[Tensor, "B K K"]:
    """At (i, j) of a worse j, log of g_i - g_j over its mean over the worse ones; 0 elsewhere."""
    gaps = differences(grades).masked_fill(~worse, 0)
    mean = gaps.sum(dim=2, keepdim=True) / worse.sum(dim=2, keepdim=True)
    return (gaps / mean).masked_fill(~worse, 1).log()


BISECTIONS = 80
"""From scores 1e5 apart to the last bit of float64."""


def _threshold(scores: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], k: int) -> Float[Tensor, "B 1"]:
    """The t for which sum_j sigmoid(s_j - t) = k, over the completions that mask names, with its gradient.

    The sum falls with t, and lies on either side of k where every term is k / n or more, or less. By the implicit
    function theorem dt/ds_j is sigmoid'(s_j - t) over the sum of all these.
    """
    exact = scores.detach().double()
    size = mask.sum(dim=1, keepdim=True)
    even = torch.logit(k / size.clamp(min=k + 1).double())
    low = exact.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=0) - even
    high = exact.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True).nan_to_num(neginf=0) - even
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = torch.sigmoid(exact - middle).masked_fill(~mask, 0).sum(dim=1, keepdim=True) > k
        low, high = middle.where(above, low), high.where(above, middle)
    gap = exact - (low + high) / 2
    log_slope = (F.logsigmoid(gap) + F.logsigmoid(-gap)).masked_fill(~mask, torch.finfo(gap.dtype).min)
    share = log_slope.softmax(dim=1).masked_fill(~mask, 0).to(scores.dtype)
    moved = (share * (scores - scores.detach())).sum(dim=1, keepdim=True)
    return ((low + high) / 2).to(scores.dtype) + moved


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
