"""Offsets of attention heads: which heads get one, and in what form PEFT's layers hold it."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.beft.layer import BeftLayer
from safetensors import safe_open
from torch import Tensor

from align.errors import UserError
from align.model.attach import STATE_FILE, TRAINED, adapter_config
from align.model.forward import evaluating, score_tokens
from align.model.middle import Loss, Product
from align.types import ListBatch


class Offset(Product):
    """W v in the place of a layer's offset: W's columns that read the chosen heads, and what is added to these."""

    def flatten(self) -> Float[Tensor, " O"]:
        """The offset of the layer's outputs."""
        return self.weight.flatten()


@torch.no_grad()
def start(
    wrapped: PeftModel,
    adapter: Any,
    *,
    batches: list[ListBatch] | None,
    loss: Loss | None,
    like: Path | None,
    **_: Any,
) -> None:
    """Give offsets of 0 to the heads by whose offsets the loss's gradient is largest, and leave other layers alone.

    With neither rows nor a state they are the first heads: as many, which is all that a plan needs.

    Raises:
        UserError: there is no loss, or a layer does not read heads.
    """
    layers: dict[str, Any] = {name: module for name, module in wrapped.named_modules() if isinstance(module, BeftLayer)}
    if batches is None and like is not None:
        chosen = _stored(layers, like)
    else:
        chosen = _leading(wrapped, layers, adapter.share, batches, loss)
    for name, layer in layers.items():
        if name in chosen:
            columns = chosen[name]
            weight = layer.get_base_layer().weight.detach().float()
            middle = torch.zeros(len(columns), 1, device=weight.device)
            del layer.beft_bias[TRAINED]  # a parameter, whose place no module takes
            layer.beft_bias[TRAINED] = Offset(weight[:, columns].clone(), middle, outer_trains=False)
        else:
            parent, last = name.rsplit(".", 1)
            setattr(wrapped.get_submodule(parent), last, layer.get_base_layer())
    config: Any = adapter_config(wrapped)
    config.target_modules = {name.removeprefix("base_model.model.") for name in chosen}


def _leading(
    wrapped: PeftModel, layers: dict[str, Any], share: float, batches: list[ListBatch] | None, loss: Loss | None
) -> dict[str, Int[Tensor, " n"]]:
    """Of every layer with chosen heads, the places of their numbers among the layer's inputs.

    A layer's offset b adds to its outputs, so that the gradient by an offset v of its inputs is W' times that by b.
    """
    for batch in batches or ():
        if loss is None:
            raise UserError("policy.adapter: it needs the gradient of a policy's loss; a reward model takes lora")
        with evaluating(wrapped), torch.enable_grad():
            batch = batch.to(next(wrapped.parameters()).device)
            loss(score_tokens(wrapped, batch), batch).sum().backward()
    text = wrapped.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    norms = []
    for name, layer in layers.items():
        weight, gradient = layer.get_base_layer().weight.float(), layer.beft_bias[TRAINED].grad
        if weight.shape[1] != width * text.num_attention_heads:
            raise UserError(f"policy.adapter.targets: {name.removeprefix('base_model.model.')} does not read heads")
        if gradient is None:
            norms.append(torch.zeros(text.num_attention_heads))
        else:
            norms.append((weight.T @ gradient.flatten().float()).view(-1, width).norm(dim=1))
    everywhere = torch.cat(norms)
    taken = torch.zeros_like(everywhere, dtype=torch.bool)
    taken[everywhere.argsort(descending=True, stable=True)[: max(1, round(share * len(everywhere)))]] = True
    heads = dict(zip(layers, taken.split([len(own) for own in norms]), strict=True))
    return {name: own.repeat_interleave(width).nonzero()[:, 0] for name, own in heads.items() if own.any()}


def _stored(layers: dict[str, Any], like: Path) -> dict[str, Int[Tensor, " n"]]:
    """As many places of every layer as a state has offsets for; the columns that belong to them are loaded with it."""
    with safe_open(like / STATE_FILE, "pt") as stored:
        sizes = {name: stored.get_slice(name).get_shape()[0] for name in stored.keys()}  # noqa: SIM118
    ending = f".beft_bias.{TRAINED}.middle"
    return {name: torch.arange(sizes[name + ending]) for name in layers if name + ending in sizes}
