"""Which layers an adapter acts in."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.model.adapter import Adapter, InLayers
from align.model.forward import is_multimodal, language_part

MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Models that hand the weight of `out_proj` to a kernel, so that PEFT refuses an adapter there."""

log = logging.getLogger(__name__)


def chosen_layers(base: PreTrainedModel, targets: Any, adapter: Adapter) -> Any:
    """An adapter's layers: of its targets those in the recipe's `layers`, without those in `exclude`.

    Args:
        targets: names, "all-linear" or None for PEFT's choice.

    Returns:
        As `language_targets`; the layers' full names where the recipe chooses among them.
    """
    found = language_targets(base, targets)
    if not isinstance(adapter, InLayers) or not (adapter.layers or adapter.exclude):
        return found
    if targets is None:
        raise ValueError("`layers` and `exclude` choose among `targets`, so name these too")
    names = layers_named(base, found)
    for name in adapter.exclude:
        kept = [own for own in names if not _is_called(own, name)]
        if len(kept) == len(names):
            raise ValueError(f"exclude: none of its layers is named {name}")
        names = kept
    if adapter.layers is not None:
        there = {number for own in names if (number := _number(own)) is not None}
        if odd := set(adapter.layers) - there:
            raise ValueError(f"layers: none has the number {min(odd)}; they are {min(there)} to {max(there)}")
        names = [own for own in names if _number(own) in adapter.layers]
    if not names:
        raise ValueError("`exclude` leaves no layer")
    return names


def layers_named(base: PreTrainedModel, targets: Any) -> list[str]:
    """The full names of an adapter's layers, given as names or "all-linear"."""
    return linear_layers(base) if targets == "all-linear" else _named(base, targets)


def _is_called(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _named(base: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    return [own for own in dict(base.named_modules()) if any(_is_called(own, name) for name in targets)]


def _number(layer: str) -> int | None:
    """A layer's place in the decoder: the first number in its name."""
    return next((int(part) for part in layer.split(".") if part.isdigit()), None)


def linear_layers(base: PreTrainedModel) -> list[str]:
    """Every linear layer but the LM head."""
    linear = ((n, m) for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D))
    return [name for name, module in linear if module is not base.get_output_embeddings()]


def language_targets(base: PreTrainedModel, targets: Any) -> Any:
    """The layers that an adapter acts in: of the language part alone, and with `all-linear` those that can take one.

    Args:
        targets: names, "all-linear" or None for PEFT's choice.

    Returns:
        The targets as they are where they mean just that; else the layers' full names.
    """
    is_language = language_part(base)
    if targets == "all-linear":
        layers = linear_layers(base)
        names = [n for n in layers if is_language(n) and _takes_adapter(base, n, base.get_submodule(n))]
        odd = [name for name in layers if name not in names]
    elif is_multimodal(base) and targets is not None:
        found = _named(base, targets)
        names = [name for name in found if is_language(name)]
        odd = [name for name in found if not is_language(name)]
    else:
        return targets
    if not odd:
        return targets
    if not names:
        raise ValueError(f"none of its language layers is named {', '.join(targets)}")
    log.info("policy.adapter: none on %d linear layers of %s, such as %s", len(odd), type(base).__name__, odd[0])
    return names


@torch.no_grad()
def _takes_adapter(base: PreTrainedModel, name: str, layer: Any) -> bool:
    """Whether a linear layer is called as one: routers that return tuples and Mamba's `out_proj` are not."""
    if base.config.model_type in MAMBAS and name.split(".")[-1] == "out_proj":
        return False
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or "bitsandbytes" in type(layer).__module__:
        return True
    try:
        found = layer(layer.weight.new_zeros(1, layer.in_features))
    except Exception:  # whatever a model's own layer makes of a plain input
        return False
    return isinstance(found, Tensor) and found.shape == (1, layer.out_features)
