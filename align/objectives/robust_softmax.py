"""A softmax over the list at a beta of the list's own."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, model_validator

from align.objectives.base import Properties
from align.objectives.lists import shares
from align.objectives.objective import OBJECTIVE, Objective
from align.tensors import Bool, Float, Tensor, torch


def robust_softmax(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    rho: float = 0.2,
    weakest: float = 0.2,
    strongest: float = 5.0,
) -> Float[Tensor, " B"]:
    """`softmax` at the beta that is worst for each list: the completions weigh as the worst distribution near the even
    one has them.

    min over t of  t log( 1/K sum_k e^{h_k / t} ) + rho t,  h_k = s_k - sum_j (g_j / sum_i g_i) s_j
    = max over p with KL(p || even) <= rho of sum_k p_k h_k, where no bound of t holds

    1 / t multiplies `score.beta`: where a list's scores spread, its own beta falls, so that one that is learnt, or
    whose grades are wrong, does not come to weigh nothing or all. The whole list is at hand, so t is solved for,
    neither tracked by row over steps nor predicted by a network, and a run has no more state for it.

    Args:
        scores: s in nats, beta included.
        grades: g, at least 0.
        list_mask: False marks padding, which may hold anything.
        rho: how far p may be from even, in nats; log K, or more, leaves `strongest` to all lists.
        weakest, strongest: bounds of 1 / t.

    Returns:
        One loss per list, in nats; 0 with zero gradient where all grades are 0.

    Source: arXiv:2305.11965, where t is tracked by steps; TempNet, arXiv:2404.04575, predicts it.
    """
    weights = shares(grades.masked_fill(~list_mask, 0)).to(scores.dtype)
    scores = scores.masked_fill(~list_mask, 0)
    size = list_mask.sum(dim=1, keepdim=True).clamp(min=1)
    above = scores - (weights * scores).sum(dim=1, keepdim=True)
    t = _temperature(above.detach().double(), list_mask, size, rho, 1 / strongest, 1 / weakest).to(scores.dtype)
    loss = t * (_logits(above, list_mask, t).logsumexp(dim=1, keepdim=True) - size.log() + rho)
    return loss.masked_fill(~(weights > 0).any(dim=1, keepdim=True), 0).squeeze(1)


@OBJECTIVE.add
class RobustSoftmax(Objective):
    """Softmax over the list, at a beta of each list's own (distributionally robust)."""

    formula = staticmethod(robust_softmax)
    properties = Properties(
        shift_invariant=True, zero_when_tied=False, dpo_at_two=False, grades="nonnegative", of_rewards=True
    )

    name: Literal["robust_softmax"] = "robust_softmax"
    rho: PositiveFloat = 0.2
    """How far from even the completions may weigh, in nats; the larger, the stronger a list's own beta."""
    weakest: PositiveFloat = 0.2
    """Least multiple of `score.beta` that a list may take."""
    strongest: PositiveFloat = 5.0
    """Largest."""

    @model_validator(mode="after")
    def _in_order(self) -> RobustSoftmax:
        if self.weakest > self.strongest:
            raise ValueError(f"weakest: {self.weakest:g} is above `strongest`, {self.strongest:g}; exchange them")
        return self


HALVINGS = 80
"""Of a range of temperatures: to the last bit of float64."""


def _temperature(
    above: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], size: Tensor, rho: float, low: float, high: float
) -> Float[Tensor, "B 1"]:
    """The t at which softmax(h / t) is rho nats from even, or the nearer bound: that distance falls with t."""
    least, most = torch.full_like(above[:, :1], low), torch.full_like(above[:, :1], high)
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        log_p = _logits(above, mask, middle).log_softmax(dim=1)
        far = (log_p.exp() * log_p).masked_fill(~mask, 0).sum(dim=1, keepdim=True) + size.log() > rho
        least, most = middle.where(far, least), most.where(far, middle)
    return (least + most) / 2


def _logits(above: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], t: Float[Tensor, "B 1"]) -> Float[Tensor, "B K"]:
    return (above / t).masked_fill(~mask, torch.finfo(above.dtype).min)
