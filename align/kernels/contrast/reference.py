"""What `contrast_logits` computes, in plain torch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def contrast_logits(
    logits: Float[Tensor, "B V"], pair: Int[Tensor, " B"], alpha: Float[Tensor, " B"], log_tau: float
) -> Float[Tensor, "B V"]:
    """(1 + alpha) z - alpha z[pair] where z >= max z + log tau, -inf elsewhere; z itself in rows with pair < 0."""
    z = logits.float()
    weight = alpha[:, None]
    contrast = (1 + weight) * z - weight * z[pair.clamp_min(0)]
    contrast = contrast.masked_fill(z < z.amax(1, keepdim=True) + log_tau, -torch.inf)
    return torch.where(pair[:, None] < 0, z, contrast)
