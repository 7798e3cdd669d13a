"""Frozen weights held in the dtype that they are used in, so that no forward pass casts them again."""

from typing import Any

import torch
from torch import Tensor, nn

from align.model.forward import base_model


def hold_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights of frozen linear layers in autocast's dtype: the numbers under autocast stay what they were.

    The token embedding goes along where that rounds none of its weights, as those of published bfloat16 checkpoints;
    what it returns is float32 as before, so the residual stream stays float32. A head that is tied to an embedding
    which would be rounded stays too.

    Every forward pass must run under autocast from here on.
    """
    base = base_model(model)
    embedding: Any = base.get_input_embeddings()
    layers = [m for m in model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    exact = not embedding.weight.requires_grad and torch.equal(embedding.weight, embedding.weight.to(dtype).float())
    if exact:
        embedding.register_forward_hook(lambda module, inputs, output: output.float())
        embedding.weight.data = embedding.weight.data.to(dtype)
    for layer in layers:
        if layer.weight is not embedding.weight:
            layer.weight.data = layer.weight.data.to(dtype)
            _cast(layer.bias, dtype)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> None:
    if bias is not None and not bias.requires_grad:
        bias.data = bias.data.to(dtype)
