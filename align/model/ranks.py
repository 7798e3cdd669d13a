"""Ranks that a LoRA's layers get by what the first lists show, all from one budget."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.model.adapters import Ranks
from align.model.forward import evaluating
from align.model.load import LoadOptions
from align.model.middle import gradients
from align.model.starts import is_read
from align.model.targets import layers_named
from align.types import ListBatch

log = logging.getLogger(__name__)

SPARE = 4
"""Directions of a layer's inputs that are kept from batch to batch, as a multiple of the most that it can get."""


def by_rows(base: PreTrainedModel, targets: Any, ranks: Ranks, rank: int, options: LoadOptions) -> dict[str, int]:
    """The rank of every layer: `rank` on average, as the first lists have it.

    Args:
        base: without an adapter; none of its weights needs a gradient afterwards.
        targets: the adapter's layers, as `chosen_layers` gives them.
        options: of them the first lists and, for `sensitivity`, the loss of each.

    Raises:
        UserError: a gradient is needed and there is no loss.
    """
    layers: dict[str, Any] = {name: base.get_submodule(name) for name in layers_named(base, targets)}
    base.requires_grad_(False)
    batches = list(options.init_batches or ())
    most = int(ranks.most * rank)
    if ranks.name == "sensitivity":
        found = gradients(base, layers, batches, options.init_loss)
        gains = {name: torch.linalg.svdvals(own).square() for name, own in found.items()}
    else:
        gains = _variances(base, layers, batches, SPARE * most)
    sizes = {name: min(module.weight.shape) for name, module in layers.items()}
    given = shared_out({name: own[: sizes[name]] for name, own in gains.items()}, rank * len(layers), most)
    log.info("policy.adapter: ranks by %s, %d to %d", ranks.name, min(given.values()), max(given.values()))
    return given


def shared_out(gains: Mapping[str, Float[Tensor, " r"]], total: int, most: int) -> dict[str, int]:
    """1 for each layer, and the others where they gain most; what is equal goes to earlier layers.

    Args:
        gains: of each layer what its first, second, ... rank is worth, falling.
        total: of all ranks, as far as there are so many.
        most: of one layer.
    """
    offers = [(-gain, place, name) for place, (name, own) in enumerate(gains.items()) for gain in own[1:most].tolist()]
    taken = [name for *_, name in sorted(offers)[: total - len(gains)]]
    return {name: 1 + taken.count(name) for name in gains}


@torch.no_grad()
def _variances(
    base: PreTrainedModel, layers: Mapping[str, nn.Module], batches: Sequence[ListBatch], kept: int
) -> dict[str, Float[Tensor, " r"]]:
    """Shares of the sum of squares of a layer's inputs that lie in their leading directions.

    From batch to batch the `kept` leading ones are carried on, as in EVA's incremental decomposition.
    """
    leading: dict[str, Tensor] = {}
    sums = dict.fromkeys(layers, 0.0)
    for batch in batches:
        batch = batch.to(base.device)
        read = is_read(batch)
        with evaluating(base), _inputs(layers) as inputs:
            base(input_ids=batch.input_ids, attention_mask=read)
        for name, own in inputs.items():
            own = own[read.bool()].float()
            sums[name] += own.square().sum().item()
            own = torch.cat([leading[name], own]) if name in leading else own
            _, s, v = torch.linalg.svd(own, full_matrices=False)
            leading[name] = (s[:, None] * v)[:kept]
    return {name: own.double().square().sum(dim=1) / sums[name] for name, own in leading.items()}


@contextmanager
def _inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What the layers are given in a pass."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, given: found.update({name: given[0]})

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
