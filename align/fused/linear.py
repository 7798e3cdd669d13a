"""A linear layer with a low-rank adapter as one operation: two matrix products accumulate into one result."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


class Projection(NamedTuple):
    """y = x W' + bias + scale (x A') B'; without factors y = x W' + bias."""

    weight: Float[Tensor, "O I"]
    bias: Float[Tensor, " O"] | None = None
    a: Float[Tensor, "r I"] | None = None
    b: Float[Tensor, "O r"] | None = None
    scale: float = 1.0


class Gradients(NamedTuple):
    """Of a loss with respect to a projection's input and parameters; None where none is wanted or there is none."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None


def lora_linear(x: Float[Tensor, "*batch I"], projection: Projection) -> Float[Tensor, "*batch O"]:
    """The projection of x, in x's dtype.

    The adapter's product is accumulated into the base layer's, and neither it nor its scaling is kept for the backward
    pass, which needs x and the r numbers per row of x A'.

    Source: ours
    """
    # Reshaped outside of the operation, whose results a model may change in place, as Gemma 3n does; views it may not.
    return _LoraLinear.apply(x.flatten(0, -2), *projection).unflatten(0, x.shape[:-1])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *fields: Any) -> Tensor:
        projection = Projection(*fields)
        y, narrow = project(x, projection)
        ctx.save_for_backward(x, narrow, *fields[:4])
        ctx.scale = projection.scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, narrow, *tensors = ctx.saved_tensors
        wanted: Any = Gradients(*ctx.needs_input_grad[:5])
        return *gradients(grad, x, narrow, Projection._make([*tensors, ctx.scale]), wanted), None


def project(x: Float[Tensor, "N I"], p: Projection) -> tuple[Float[Tensor, "N O"], Float[Tensor, "N r"] | None]:
    """A projection, and x A' if it has factors."""
    bias = None if p.bias is None else p.bias.to(x.dtype)
    y = F.linear(x, p.weight.to(x.dtype), bias)
    if p.a is None or p.b is None:
        return y, None
    narrow = F.linear(x, p.a.to(x.dtype))
    return y.addmm_(narrow, p.b.to(x.dtype).T, alpha=p.scale), narrow


def gradients(
    grad: Float[Tensor, "N O"],
    x: Float[Tensor, "N I"],
    narrow: Float[Tensor, "N r"] | None,
    p: Projection,
    wanted: Any,
    into: Float[Tensor, "N I"] | None = None,
) -> Gradients:
    """The backward pass of `project`.

    Args:
        wanted: Gradients of booleans.
        into: an input gradient that this one is added to.
    """
    dx = None
    if wanted.x:
        weight = p.weight.to(grad.dtype)
        dx = grad @ weight if into is None else into.addmm_(grad, weight)
    da = db = None
    if p.a is not None and p.b is not None and narrow is not None:
        inner = (grad @ p.b.to(grad.dtype)).mul_(p.scale)
        if dx is not None:
            dx.addmm_(inner, p.a.to(grad.dtype))
        da = (inner.T @ x).to(p.a.dtype) if wanted.a else None
        db = (grad.T @ narrow).mul_(p.scale).to(p.b.dtype) if wanted.b else None
    return Gradients(
        x=dx,
        weight=(grad.T @ x).to(p.weight.dtype) if wanted.weight else None,
        bias=grad.sum(0).to(p.bias.dtype) if wanted.bias and p.bias is not None else None,
        a=da,
        b=db,
    )
