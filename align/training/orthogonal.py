"""Gradients across the weights: nothing of a step goes into making a tensor longer."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from align.errors import UserError

ROUNDING = 8
"""Units in the last place by which a gradient along its weights may seem to leave them."""


def keep_orthogonal(optimizer: Optimizer, *, cut: bool) -> None:
    """Turn every tensor's gradient across the tensor, before each of the optimizer's steps.

    Args:
        cut: whether a process holds parts of the tensors.

    Raises:
        UserError: they are cut.
    """
    if cut:
        raise UserError(
            "train.orthogonal_gradient: it looks at whole tensors, which FSDP and DeepSpeed cut; leave it out"
        )
    optimizer.register_step_pre_hook(_turn)


@torch.no_grad()
def _turn(optimizer: Any, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in (p for p in group["params"] if p.grad is not None):
            parameter.grad.copy_(across(parameter.grad, parameter))


def across(gradient: Tensor, weight: Tensor) -> Tensor:
    """g - (w.g / w.w) w, as long as g; g itself where w is 0, 0 where g is along w.

    A multiple of its weights scales a layer's outputs: where nothing else lowers the loss any more, gradients line up
    with that direction, and logits grow until float32 rounds their probabilities to 0 and 1.

    Source: arXiv:2501.04697 (perpGrad).
    """
    own, length = weight.square().sum(), gradient.norm()
    rest = gradient - weight * torch.where(own > 0, (weight * gradient).sum() / own, 0)
    left = rest.norm()
    rounded = ROUNDING * torch.finfo(gradient.dtype).eps * length  # less has no direction of its own
    return rest * torch.where(left > rounded, length / left, 0)
