"""`sample`: draw a token per row and say how likely it was."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.kernels.sampling.op import sample_op


@dataclass(frozen=True)
class Sample:
    """A drawn token per row, and its log-probabilities in nats."""

    token: Int[Tensor, " B"]
    raw_logprob: Float[Tensor, " B"]
    """Under softmax(logits)."""
    processed_logprob: Float[Tensor, " B"]
    """Under the distribution it was drawn from; 0 at temperature 0."""
    entropy: Float[Tensor, " B"]
    """Of softmax(logits)."""
    rank: Int[Tensor, " B"] | None
    """1 for the most likely token; None if not asked for."""


def sample(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float | Float[Tensor, " B"] = 1.0,
    top_k: int | Int[Tensor, " B"] = 0,
    top_p: float | Float[Tensor, " B"] = 1.0,
    min_p: float | Float[Tensor, " B"] = 0.0,
    seed: int | Int[Tensor, " B"],
    position: int | Int[Tensor, " B"],
    rank: bool = True,
) -> Sample:
    """Draw from softmax(logits / temperature) after min-p, top-k and top-p, in this order.

    The same (seed, position) gives the same uniform number whatever the batch; equal logits stay or go together.

    Args:
        logits: in any dtype.
        temperature: 0 takes the first of the largest logits.
        top_k: keep this many; 0 for all.
        top_p: keep the most likely tokens until their mass reaches this; 1 for all.
        min_p: keep tokens at least this likely relative to the most likely one; 0 for all.
        seed: of the request.
        position: of the token in its sequence.
        rank: whether to count how many tokens are more likely, for which a GPU may read the row again.

    Source: ours; splitmix64 of Steele, Lea and Flood (2014).
    """
    heat, nucleus, least = (_per_row(value, logits, torch.float32) for value in (temperature, top_p, min_p))
    count, seeds, positions = (_per_row(value, logits, torch.int64) for value in (top_k, seed, position))
    drawn = Sample(*sample_op(logits.detach(), heat, count, nucleus, least, seeds, positions, rank))
    return drawn if rank else replace(drawn, rank=None)


def _per_row(value: float | Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=logits.device).expand(logits.shape[0]).contiguous()
