"""`contrast_logits`: what one row's model knows beyond another's."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.kernels.checks import FINITE, check_logits, check_number, check_targets, per_row, readable
from align.kernels.contrast.op import contrast_logits_op


def contrast_logits(
    logits: Float[Tensor, "B V"],
    pair: Int[Tensor, " B"],
    alpha: float | Float[Tensor, " B"],
    *,
    mask_tau: float = 0.1,
) -> Float[Tensor, "B V"]:
    """(1 + alpha) z - alpha z[pair] over tokens whose probability is at least mask_tau of the row's largest.

    Args:
        logits: rows of several models or prompts.
        pair: the row each row is held against; negative leaves it as it is.
        alpha: strength, finite; 0 only masks.
        mask_tau: plausibility, in (0, 1].

    Returns:
        Float32; -inf where implausible.

    Raises:
        ValueError: other shapes, a pair that is no row (on a CPU; a GPU's would have to be waited for), or a setting
            out of its range.

    Source: Li et al. (2210.15097) for the mask, O'Brien and Lewis (2309.09117, eq. 2) for the difference.
    """
    check_logits("contrast_logits", logits)
    check_targets("contrast_logits", pair, (logits.shape[0],), what="pair")
    check_number("contrast_logits", "mask_tau", mask_tau, "a number above 0 and at most 1", most=1.0)
    if readable(pair) and pair.numel() and int(pair.max()) >= len(pair):
        row = int(pair.argmax())
        raise ValueError(f"contrast_logits: pair of row {row} is {int(pair[row])}; there are {len(pair)} rows")
    strength = per_row("contrast_logits", "alpha", alpha, logits, torch.float32, FINITE)
    return contrast_logits_op(logits, pair.contiguous(), strength, math.log(mask_tau))
