"""`contrast_logits`: what one row's model knows beyond another's."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
        alpha: strength; 0 only masks.
        mask_tau: plausibility, in (0, 1].

    Returns:
        Float32; -inf where implausible.

    Source: Li et al. (2210.15097) for the mask, O'Brien and Lewis (2309.09117, eq. 2) for the difference.
    """
    strength = torch.as_tensor(alpha, dtype=torch.float32, device=logits.device).expand(logits.shape[0]).contiguous()
    return contrast_logits_op(logits, pair.contiguous(), strength, math.log(mask_tau))
