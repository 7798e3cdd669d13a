"""Root-mean-square normalisation under a frozen weight, in few passes over memory."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm(x: Float[Tensor, "*batch H"], weight: Float[Tensor, " H"], eps: float) -> Float[Tensor, "*batch H"]:
    """weight x / sqrt(mean(x^2) + eps); keeps x and one number per row for the backward pass. No gradient of weight.

    Source: ours; the formula is Zhang and Sennrich's (2019).
    """
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inverse, weight = ctx.saved_tensors
        grad, unit = grad * weight, x * inverse
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1).div_(x.shape[-1])
        return grad.addcmul_(unit, along, value=-1).mul_(inverse), None, None
