"""A gated feed-forward block as one operation that keeps its input and two inner tensors for the backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from align.fused.linear import Gradients, Projection, gradients, project


class Activation(NamedTuple):
    """An elementwise function, and its gradient from that of its output and its input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh")
    ),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
}
"""Name -> activation that the block can have."""


def gated_mlp(
    x: Float[Tensor, "*batch H"], gate: Projection, up: Projection, down: Projection, activation: Activation
) -> Float[Tensor, "*batch H"]:
    """down(activation(gate(x)) * up(x)), in x's dtype.

    Plain operations keep x, gate(x), up(x), the activation and the product, of which the last two are made again from
    the others here: 2 of 4 tensors of the inner width.

    Source: ours; Liger Kernel's SwiGLU keeps the same two.
    """
    rows = _GatedMlp.apply(x.flatten(0, -2), activation, *gate, *up, *down)  # reshaped outside, as in lora_linear
    return rows.unflatten(0, x.shape[:-1])


FIELDS = len(Projection._fields)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, *fields: Any) -> Tensor:
        gate, up, down = _projections(fields)
        inner_gate, narrow_gate = project(x, gate)
        inner_up, narrow_up = project(x, up)
        y, narrow_down = project(activation.forward(inner_gate).mul_(inner_up), down)
        ctx.save_for_backward(
            x, inner_gate, inner_up, narrow_gate, narrow_up, narrow_down, *gate[:-1], *up[:-1], *down[:-1]
        )
        ctx.activation, ctx.scales = activation, (gate.scale, up.scale, down.scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inner_gate, inner_up, narrow_gate, narrow_up, narrow_down, *tensors = ctx.saved_tensors
        width = FIELDS - 1
        parts = [Projection._make([*tensors[i * width : (i + 1) * width], ctx.scales[i]]) for i in range(3)]
        needs = ctx.needs_input_grad
        # Fields in the order of the arguments; a projection's scale has no gradient.
        wanted: list[Any] = [Gradients(needs[0], *needs[2 + i * FIELDS : 2 + i * FIELDS + width]) for i in range(3)]

        active = ctx.activation.forward(inner_gate)
        down = gradients(grad, active * inner_up, narrow_down, parts[2], wanted[2]._replace(x=True))
        assert down.x is not None
        to_up = active.mul_(down.x)
        up = gradients(to_up, x, narrow_up, parts[1], wanted[1])
        to_gate = ctx.activation.backward(down.x.mul_(inner_up), inner_gate)
        gate = gradients(to_gate, x, narrow_gate, parts[0], wanted[0], into=up.x)
        return gate.x, None, *gate[1:], None, *up[1:], None, *down[1:], None


def _projections(fields: tuple[Any, ...]) -> list[Projection]:
    return [Projection(*fields[i : i + FIELDS]) for i in range(0, 3 * FIELDS, FIELDS)]
