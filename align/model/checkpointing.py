"""Which layers compute their activations again in the backward pass instead of keeping them."""

import logging
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from align.model.forward import TokenScorer, base_model
from align.model.sharding import own_part
from align.types import ListBatch

log = logging.getLogger(__name__)

FREE_SHARE = 0.8
"""Of the memory that is free, what activations may take: the head, the optimizer and the allocator need some too."""

SMALL = 2**16
"""Bytes of a tensor below which moving it costs more than it saves."""


def checkpoint_layers(model: nn.Module, count: int | None = None) -> None:
    """Keep only their inputs of the first `count` layers, by default of all but the last; of the others keep all.

    The last layer never computes again: what it keeps is needed at once, and it depends on which rows were asked for.
    """
    base = base_model(model)
    layers = _layers(base)
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)  # since 5.24
    enable({"use_reentrant": False})
    for place, layer in enumerate(layers):
        layer.gradient_checkpointing = place < min(len(layers) - 1, len(layers) if count is None else count)


class OnHost(saved_tensors_hooks):
    """Inside, what a forward pass keeps for its backward pass waits in the host's memory, pinned where there is a GPU.

    Of layers that compute again that is their inputs; weights and what is small stay where they are. The numbers are
    the same bit for bit.

    Source: torch.autograd.graph.save_on_cpu, which moves weights too.
    """

    def __init__(self, model: nn.Module) -> None:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        pinned = torch.cuda.is_available()

        def pack(x: Tensor) -> Any:
            if x.nbytes < SMALL or x.untyped_storage().data_ptr() in own:
                return x
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
            return x.device, host.copy_(x)

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=pinned)

        super().__init__(pack, unpack)


def layers_to_checkpoint(scorer: TokenScorer, batch: ListBatch, *, tokens: int, budget: float | None = None) -> int:
    """The fewest layers that must compute again for a micro-batch to fit.

    One forward pass over a small batch shows what a token costs: everything that autograd keeps, parameters aside.

    Args:
        tokens: of the largest micro-batch.
        budget: bytes for activations; by default most of what is free on the device.
    """
    base = base_model(scorer.model)
    layers = len(_layers(base))
    budget = FREE_SHARE * _free_bytes(base.device) if budget is None else budget
    kept = _kept_bytes(scorer, batch) * tokens / batch.input_ids.numel() / layers
    inputs = tokens * base.config.get_text_config().hidden_size * 4  # float32 at most
    needs = [(layers - n) * kept + n * inputs + (kept if n else 0.0) for n in range(layers)]
    count = next((n for n, bytes_ in enumerate(needs) if bytes_ <= budget), layers - 1)
    log.info(
        "activations of %d tokens: %.2f GB of %.2f GB, with %d of %d layers computed again in the backward pass",
        tokens,
        needs[count] / 1e9,
        budget / 1e9,
        count,
        layers,
    )
    return count


def _layers(base: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def _kept_bytes(scorer: TokenScorer, batch: ListBatch) -> int:
    """Bytes of all storages that a forward pass keeps for its backward pass, without the parameters'."""
    own = {own_part(parameter).untyped_storage().data_ptr() for parameter in scorer.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.layout != torch.strided:  # a sparse one has several, and an adapter's is small
            return x
        storage = x.untyped_storage()
        # Sharded, a parameter is another one inside the pass, whole; its layer drops it when it has run.
        if storage.data_ptr() not in own and not isinstance(x if x._base is None else x._base, nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        stats = scorer(batch)  # held until all is counted, so that no storage takes another's place
    del stats
    return sum(kept.values())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
