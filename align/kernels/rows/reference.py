"""What the row kernels compute, in plain torch and float32 (float64 stays float64)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def upcast(x: Float[Tensor, "*b V"]) -> Float[Tensor, "*b V"]:
    """float32 for the half dtypes, unchanged otherwise."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def softmax(x: Float[Tensor, "*b V"]) -> Float[Tensor, "*b V"]:
    """p_v = exp(x_v) / sum_u exp(x_u)."""
    return torch.softmax(upcast(x), dim=-1)


def sparse_softmax(x: Float[Tensor, "*b V"], k: int) -> Float[Tensor, "*b V"]:
    """Softmax over the k largest entries, 0 elsewhere; among equal entries the first ones count as larger."""
    order = torch.sort(upcast(x), dim=-1, descending=True, stable=True).indices[..., :k]
    kept = torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, True)
    return torch.softmax(upcast(x).masked_fill(~kept, -torch.inf), dim=-1)


def stablemax(x: Float[Tensor, "*b V"]) -> Float[Tensor, "*b V"]:
    """p_v = s(x_v) / sum_u s(x_u), s(x) = 1 + x for x >= 0 and 1 / (1 - x) below (Prieto et al., 2501.04697)."""
    positive = upcast(x).clamp_min(0)
    negative = upcast(x).clamp_max(0)
    s = torch.where(x >= 0, 1 + positive, 1 / (1 - negative))
    return s / s.sum(-1, keepdim=True)


def log_softmax(x: Float[Tensor, "*b V"]) -> Float[Tensor, "*b V"]:
    """x_v - log sum_u exp(x_u)."""
    return torch.log_softmax(upcast(x), dim=-1)


def logsumexp(x: Float[Tensor, "*b V"]) -> Float[Tensor, "*b"]:
    """log sum_v exp(x_v); -inf for a row of -inf."""
    return torch.logsumexp(upcast(x), dim=-1)


def selective_logprobs(
    logits: Float[Tensor, "*b V"], targets: Int[Tensor, "*b"], temperature: float = 1.0
) -> Float[Tensor, "*b"]:
    """log_softmax(logits / temperature)[target]; 0 where the target is negative."""
    logprobs = log_softmax(upcast(logits) / temperature).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return logprobs.masked_fill(targets < 0, 0)
