"""What is wrong with weights that give no finite numbers: of the file, not of who uses them."""

import math

import torch
from torch import nn

LARGEST = 1e6
"""No weight of a working model is larger; a flipped bit of an exponent makes one of up to 1e38."""
REMEDY = "the file is damaged, or a training that broke has saved it: take another copy"


@torch.no_grad()
def broken_weights(model: nn.Module) -> str:
    """The first weights that are NaN, infinite or beyond any model's, in words; empty where there are none.

    To be asked where something that the model gives is not finite: it reads every weight.
    """
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if not parameter.is_floating_point() or parameter.is_meta:
            continue
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # of a sharded one
        if count := int((~own.isfinite()).sum()):
            return f"`{name}` holds no finite numbers ({count} of {own.numel()} are NaN or infinite)"
        if own.numel() and (largest := float(own.abs().max())) > LARGEST:
            return f"a weight of `{name}` is {largest:.2g}, beyond any working model's"
    return ""


def why_not_finite(model: nn.Module, value: float) -> str:
    """`broken_weights` of a file, and what to do, where a value of its model is no finite number; else empty."""
    broken = "" if math.isfinite(value) else broken_weights(model)
    return broken and f"{broken}: {REMEDY}"
