"""How far float sums may be off, so that no objective and no metric ranks by rounding.

The same completion gets another log-probability in its last digits whenever a batch is cut, padded or packed otherwise,
and before the first step the log-ratios of a whole list are nothing but that. What ranks takes scores as tied where the
two errors could explain their difference.
"""

from __future__ import annotations

from collections.abc import Callable

from align.tensors import Bool, Float, Int, Tensor, torch

FULL, HALF = 32.0, 2.0
"""Rounding steps by which a token's log-probability may be off, per nat. Measured on lists of up to 1,000 tokens under
every cut, the largest error of a sum was 14 steps of float32. Under bfloat16, whose sums and softmax are float32, it
was 0.7 on text that a model knows, and 5 (1.2 on average) on text that it does not; to allow for all of that would hide
small margins."""


def resolution(*dtypes: torch.dtype) -> float:
    """Relative error of a number that a model computes where these dtypes are involved; the coarsest decides.

    Args:
        dtypes: of the weights, of the autocast.

    Source: ours; measured.
    """
    return max(torch.finfo(dtype).eps * (FULL if dtype.itemsize > 2 else HALF) for dtype in dtypes)


def sum_noise(
    score: Callable[[Tensor], Tensor],
    logprobs: Float[Tensor, "N C"],
    completion_mask: Bool[Tensor, "N C"],
    relative: float,
) -> Float[Tensor, " N"]:
    """How far the error of every token's log-probability may move a score that is made of them.

    sqrt(sum over t of (ds / dlp_t * relative * (1 + |lp_t|))^2): rounding errors are independent, so they add like
    standard deviations; and a step of the score's own last digit

    Args:
        score: a function of the log-probabilities, one score per completion.
        logprobs: lp, in nats; anything where completion_mask is False.
        completion_mask: True on a completion's own tokens.
        relative: from `resolution`.

    Returns:
        One bound per completion, in the unit of the score.

    Source: ours.
    """
    leaf = logprobs.detach().masked_fill(~completion_mask, 0).requires_grad_()
    with torch.enable_grad():
        values = score(leaf)
        (slope,) = torch.autograd.grad(values.sum(), leaf)
    errors = (slope * (1 + leaf.detach().abs())).masked_fill(~completion_mask, 0)
    return relative * errors.double().norm(dim=1).to(values.dtype) + own_noise(values.detach(), 1.0)


def own_noise(values: Float[Tensor, ...], steps: float = FULL) -> Float[Tensor, ...]:
    """The error of numbers of which nothing is known but their size: some steps of their own last digit."""
    return torch.finfo(values.dtype).eps * steps * (1 + values.detach().abs())


def settled(
    scores: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"], noise: Float[Tensor, "B K"] | None = None
) -> Float[Tensor, "B K"]:
    """Places from the lowest score up, the same for scores that only noise tells apart; for ranking only.

    Sorted, a score is above the one before where their gap is more than the noise of both; so ties are groups, and what
    is tied to a tied score is tied.

    Args:
        scores: any unit; anything where list_mask is False.
        list_mask: False marks padding, whose place means nothing.
        noise: how far each score may be off; None: `own_noise`.

    Returns:
        0 and up, in the dtype of the scores, without gradient.

    Source: ours.
    """
    scores = scores.detach().masked_fill(~list_mask, -torch.inf)
    noise = own_noise(scores) if noise is None else noise.to(scores.dtype)
    ordered, order = scores.sort(dim=1)
    own = noise.masked_fill(~list_mask, 0).gather(1, order)
    above = ordered.diff(dim=1) > own[:, 1:] + own[:, :-1]
    place: Int[Tensor, "B K"] = torch.cat([torch.zeros_like(order[:, :1]), above.cumsum(dim=1)], dim=1)
    return torch.zeros_like(scores).scatter(1, order, place.to(scores.dtype))
