"""`sample`: draw a token per row and say how likely it was."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.kernels.checks import Range, check_logits, per_row, readable
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
        logits: in any floating dtype.
        temperature: at least 0, which takes the first of the largest logits.
        top_k: keep this many; 0 for all.
        top_p: keep the most likely tokens until their mass reaches this, in (0, 1]; 1 for all.
        min_p: keep tokens at least this likely relative to the most likely one, in [0, 1]; 0 for all.
        seed: of the request.
        position: of the token in its sequence.
        rank: whether to count how many tokens are more likely, for which a GPU may read the row again.

    Raises:
        ValueError: a setting out of its range, rows without a token, or a row of logits that is no distribution (all
            -inf, or a NaN or an infinity in it); names the argument and the row. On a GPU, whose results would have to
            be waited for, settings given as tensors and logits are not looked at: such a row's raw log-probability is
            NaN.

    Source: ours; splitmix64 of Steele, Lea and Flood (2014).
    """
    check_logits("sample", logits)
    settings = [
        per_row("sample", name, value, logits, dtype, RANGES.get(name))
        for name, value, dtype in (
            ("temperature", temperature, torch.float32),
            ("top_k", top_k, torch.int64),
            ("top_p", top_p, torch.float32),
            ("min_p", min_p, torch.float32),
            ("seed", seed, torch.int64),
            ("position", position, torch.int64),
        )
    ]
    drawn = Sample(*sample_op(logits.detach(), *settings, rank))
    if readable(logits) and math.isnan(drawn.raw_logprob.sum().item()):  # the quickest way to see one among them
        _refuse(drawn.raw_logprob, logits, settings[:4])
    return drawn if rank else replace(drawn, rank=None)


RANGES = {
    "temperature": Range("a finite number of at least 0", lambda v: 0 <= v < math.inf),
    "top_k": Range("at least 0, which keeps all", lambda v: v >= 0),
    "top_p": Range("above 0 and at most 1", lambda v: 0 < v <= 1),
    "min_p": Range("from 0 to 1", lambda v: 0 <= v <= 1),
}


def _refuse(raw: Tensor, logits: Tensor, settings: list[Tensor]) -> None:
    """Say why the first row without a log-probability has none."""
    row = int(raw.isnan().nonzero()[0, 0])
    for (name, allowed), values in zip(RANGES.items(), settings, strict=True):
        if not allowed.holds(value := values[row].item()):
            raise ValueError(f"sample: {name} of row {row} is {value:g}; give {allowed.words}")
    z = logits[row]
    what = "a NaN" if z.isnan().any() else "an infinity" if (z == torch.inf).any() else "no token but -inf"
    raise ValueError(f"sample: row {row} of logits has {what}, so it is no distribution to draw from")
