"""Softmax and its relatives over the last axis, float32 whatever the input's dtype."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.kernels.checks import check_floating, check_number, check_targets
from align.kernels.rows.op import result_dtype, selective_logprobs_op, softmax_into, softmax_op


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
        method: "softmax"; "sparse", softmax over the `k` largest entries and 0 elsewhere (among equal entries the first
            are kept); "stablemax", rational instead of exponential.
        k: how many entries "sparse" keeps.
        out: where to write, contiguous; then no gradient flows.

    Returns:
        Float32. NaN for a row of -inf, as torch has it.

    Raises:
        ValueError: another method, "sparse" without a k between 1 and V, an x of no floating numbers, or an `out` that
            is not contiguous floats of x's shape.

    Source: two-pass softmax of Dukhan and Ablavatski (2001.04438); stablemax of Prieto et al. (2501.04697).
    """
    if method not in ("softmax", "sparse", "stablemax"):
        raise ValueError(f"softmax: there is no method {method!r}; take softmax, sparse or stablemax")
    check_floating("softmax", x=x)
    if method == "sparse" and not 1 <= (k or 0) <= x.shape[-1]:
        raise ValueError(f'softmax(method="sparse") needs k between 1 and {x.shape[-1]}, got {k}')
    return _rows(x, method, k or 0, out)


def log_softmax(x: Float[Tensor, "*b V"], *, out: Float[Tensor, "*b V"] | None = None) -> Float[Tensor, "*b V"]:
    """Log-probabilities over the last axis, float32; `out` as in `softmax`."""
    return _rows(x, "log_softmax", 0, out)


def _rows(x: Tensor, method: str, k: int, out: Tensor | None) -> Tensor:
    check_floating(method, x=x)
    if out is None:
        return softmax_op(_flat(x), method, k).view(x.shape)
    if out.shape != x.shape or not out.is_contiguous() or not out.is_floating_point():
        raise ValueError(f"{method}: out is {out.dtype} {list(out.shape)}; give contiguous floats {list(x.shape)}")
    with torch.no_grad():
        softmax_into(_flat(x), method, k, _flat(out))
    return out


def _flat(x: Tensor) -> Tensor:
    """Rows by the last axis; of an axis without elements too, where a -1 could be any number."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def logsumexp(x: Float[Tensor, "*b V"], *, out: Float[Tensor, "*b"] | None = None) -> Float[Tensor, "*b"]:
    """log sum exp over the last axis, float32; -inf for a row of -inf; `out` as in `softmax`."""
    check_floating("logsumexp", x=x)
    flat = _flat(x)
    nothing = torch.empty(flat.shape[0], 0, dtype=torch.int64, device=x.device)
    value = selective_logprobs_op(flat, nothing, 1.0)[1].to(result_dtype(x)).view(x.shape[:-1])
    return value if out is None else out.copy_(value.detach())


def selective_logprobs(
    logits: Float[Tensor, "*b V"], targets: Int[Tensor, "*b"], *, temperature: float = 1.0
) -> Float[Tensor, "*b"]:
    """log softmax(logits / temperature) at each target, float32; 0 (and no gradient) where the target is negative.

    Raises:
        ValueError: not one whole number for each row of logits, or a temperature that is not above 0.
        IndexError: a target beyond the vocabulary (on a CPU).
    """
    check_floating("selective_logprobs", logits=logits)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets {list(targets.shape)} for logits {list(logits.shape)}; give one for each row")
    check_targets("selective_logprobs", targets, logits.shape[:-1])
    check_number("selective_logprobs", "temperature", temperature, "a finite number above 0")
    ids = targets.long().reshape(-1, 1)
    return selective_logprobs_op(_flat(logits), ids, temperature)[0].view(targets.shape)
