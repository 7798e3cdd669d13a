"""Training on weights cut by FSDP2: what it cannot do exactly, and an optimizer's state in parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as parts
from torch import Tensor, nn
from torch.optim import Optimizer

from align.errors import UserError
from align.model.adapters import Full
from align.model.middle_adapters import MIDDLES
from align.model.sharding import at_rest, own_part, own_places, sharding_asked
from align.recipe import Recipe
from align.training.part_reader import PartReader

PARTS = "optimizer"
"""A checkpoint's folder of the optimizer's state, as torch's distributed checkpoint."""
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that treat every weight alone, so that a part of a matrix moves as it does in the whole."""


def check_sharded(recipe: Recipe, loss: Any) -> None:
    """Refuse, before a model is loaded, what would not be the same on sharded weights.

    Raises:
        UserError: names the key and what goes instead.
    """
    if not sharding_asked():
        return
    full = isinstance(recipe.policy.adapter, Full) and recipe.policy.start_adapter is None
    optimizer = recipe.train.optimizer.name
    refused = {
        "policy.adapter: adalora ranks directions by whole gradients; use lora": recipe.policy.adapter.needs_steps,
        "policy.adapter: its factors are of whole weights, and were not tried on cut ones; use lora": isinstance(
            recipe.policy.adapter, MIDDLES
        ),
        "reference: moving averages whole weights; leave it out": recipe.reference.name == "moving",
        "reward.balance: more compares whole gradients of the head; use mean": recipe.task == "reward"
        and recipe.reward.balance == "more",
        "objective: kto's baseline needs the reference at every step, which full training would hold as a second "
        "model; use lora": full and recipe.task != "reward" and loss.needs_baseline,
        "reference.cache: false makes full training hold a second model; leave it out": full
        and not recipe.reference.cache,
        "policy.quantization: 4bit is not cut; take recipes/accelerate/ddp.yaml, or policy.dtype: bfloat16 without "
        "quantization": recipe.policy.quantization is not None,
        f"train.optimizer: {optimizer} looks at whole matrices; use adamw_torch": optimizer not in ELEMENTWISE,
    }
    for reason, found in refused.items():
        if found:
            raise UserError(f"{reason} (accelerate's configuration shards the weights: FSDP)")


def save_optimizer(optimizer: Any, model: nn.Module, folder: Path) -> None:
    """Every process writes its part of the optimizer's state; all must call it."""
    parts.save(_tensors(optimizer, model), checkpoint_id=folder / PARTS)


def load_optimizer(optimizer: Any, model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's state back, whatever it was cut into and whatever this process holds.

    Raises:
        UserError: a part is not there.
    """
    if not (folder / PARTS).is_dir():
        stored = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)["state"]
        for place, (_, parameter) in enumerate(_named(optimizer, model)):
            if place in stored:
                optimizer.state[parameter] = {k: _like(v, parameter) for k, v in stored[place].items()}
        return
    reader = PartReader(folder / PARTS)
    known = _whole_metadata(reader, folder).state_dict_metadata
    found: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer, model):
        state: dict[str, Tensor] = {}
        for path in (p for p in known if p.rpartition("/")[0] == name):
            state[path.rpartition("/")[2]] = found[path] = _empty(known[path], parameter)
        if state:
            optimizer.state[parameter] = state
    parts.load(found, storage_reader=reader)


def set_rates(optimizer: Any, scheduler: Any) -> None:
    """Give the optimizer the learning rates that a loaded scheduler stands at."""
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _named(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimizer's parameters in its own order, with their names."""
    at_rest(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def _tensors(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    named = dict(_named(optimizer, model))
    return {f"{name}/{key}": value for name, p in named.items() for key, value in optimizer.state.get(p, {}).items()}


def _empty(metadata: Any, parameter: Tensor) -> Tensor:
    """A tensor to load into: cut as its parameter is, where it has a value for each weight."""
    if tuple(metadata.size) == tuple(parameter.shape) and parameter.dim():
        return torch.zeros_like(parameter, dtype=metadata.properties.dtype, requires_grad=False)
    return torch.zeros(metadata.size, dtype=metadata.properties.dtype)


def _like(value: Any, parameter: Tensor) -> Any:
    """A stored value, cut as its parameter is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or not parameter.dim():
        return value.clone() if isinstance(value, Tensor) else value
    found = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
    own_part(found).copy_(value[own_places(parameter)])
    return found


def _whole_metadata(reader: Any, folder: Path) -> Any:
    """What a distributed checkpoint says that it holds, if all its files are there.

    Raises:
        UserError: names a file that is missing or too short.
    """
    remedy = "remove this checkpoint, and the run goes on from an older one"
    try:
        metadata = reader.read_metadata()
    except UserError:
        raise
    except Exception as error:  # whatever reading makes of a file that is not there or cut short
        raise UserError(f"{folder / PARTS}: has no readable .metadata; {remedy}") from error
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = folder / PARTS / name
        if not file.is_file() or file.stat().st_size < end:
            raise UserError(f"{file}: this part of the checkpoint is missing or incomplete; {remedy}")
    return metadata
