"""Softmax and its relatives over the last axis, float32 whatever the input's dtype."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from align.kernels.rows import reference


def softmax(
    x: Float[Tensor, "*b V"],
    *,
    method: Literal["softmax", "sparse", "stablemax"] = "softmax",
    k: int | None = None,
    out: Float[Tensor, "*b V"] | None = None,
) -> Float[Tensor, "*b V"]:
    """Probabilities over the last axis.

    Args:
        x: scores.
        method: "softmax"; "sparse", softmax over the `k` largest entries and 0 elsewhere; "stablemax", rational instead
            of exponential.
        k: how many entries "sparse" keeps.
        out: where to write; no gradient then.

    Returns:
        Float32. NaN for a row of -inf, as torch has it.
    """
    if method == "sparse":
        p = reference.sparse_softmax(x, k or x.shape[-1])
    else:
        p = reference.softmax(x) if method == "softmax" else reference.stablemax(x)
    return p if out is None else out.copy_(p.detach())


def log_softmax(x: Float[Tensor, "*b V"], *, out: Float[Tensor, "*b V"] | None = None) -> Float[Tensor, "*b V"]:
    """Log-probabilities over the last axis, float32; `out` as in `softmax`."""
    log_p = reference.log_softmax(x)
    return log_p if out is None else out.copy_(log_p.detach())


def logsumexp(x: Float[Tensor, "*b V"], *, out: Float[Tensor, "*b"] | None = None) -> Float[Tensor, "*b"]:
    """log sum exp over the last axis, float32; -inf for a row of -inf; `out` as in `softmax`."""
    value = reference.logsumexp(x)
    return value if out is None else out.copy_(value.detach())


def selective_logprobs(
    logits: Float[Tensor, "*b V"], targets: Int[Tensor, "*b"], *, temperature: float = 1.0
) -> Float[Tensor, "*b"]:
    """log softmax(logits / temperature) at each target, float32; 0 (and no gradient) where the target is negative."""
    return reference.selective_logprobs(logits, targets, temperature)
