"""Training on weights cut by FSDP2: an optimizer's state in parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as parts
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.optim import Optimizer

from align.errors import UserError
from align.model.sharding import at_rest, own_part, own_places
from align.training.part_reader import PartReader

PARTS = "optimizer"
"""A checkpoint's folder of the optimizer's state, as torch's distributed checkpoint."""
OLDER = "remove this checkpoint, and the run goes on from an older one"
GROUP = "group."
"""Begins the places of what an optimizer keeps beside its parameters: some count their steps there."""


def save_optimizer(optimizer: Any, model: nn.Module, folder: Path) -> None:
    """Every process writes its part of the optimizer's state; all must call it."""
    parts.save(_tensors(optimizer, model), checkpoint_id=folder / PARTS)


def load_optimizer(optimizer: Any, model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's state back, whatever it was cut into and whatever this process holds.

    Raises:
        UserError: a part is not there, or holds something else.
    """
    if not (folder / PARTS).is_dir():
        whole = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
        stored = whole["state"]
        for group, kept in zip(optimizer.param_groups, whole["param_groups"], strict=False):
            group |= {name: value for name, value in kept.items() if _is_plain(value)}
        for place, (_, parameter) in enumerate(_named(optimizer, model)):
            if place in stored:
                optimizer.state[parameter] = {k: _like(v, parameter) for k, v in stored[place].items()}
        return
    reader = PartReader(folder / PARTS)
    known = _whole_metadata(reader, folder).state_dict_metadata
    held = dict(_named(optimizer, model))
    found = {path: _empty(entry, held.get(path.rpartition("/")[0])) for path, entry in known.items()}
    try:
        parts.load(found, storage_reader=reader, planner=_PlainPlanner(flatten_state_dict=False))
    except CheckpointException as error:
        raise UserError(f"{folder / PARTS}: holds what no checkpoint of an optimizer does; {OLDER}") from error
    for path, value in found.items():
        name, _, key = path.rpartition("/")
        if name in held:
            optimizer.state[held[name]][key] = value
        elif name.startswith(GROUP) and int(name.removeprefix(GROUP)) < len(optimizer.param_groups):
            optimizer.param_groups[int(name.removeprefix(GROUP))][key] = value


class _PlainPlanner(parts.DefaultLoadPlanner):
    """Reads what is no tensor, a count of steps, without running what a stranger may have put there."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


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
    groups = {
        f"{GROUP}{number}/{key}": value
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if _is_plain(value)
    }
    return groups | {
        f"{name}/{key}": value for name, p in named.items() for key, value in optimizer.state.get(p, {}).items()
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _empty(metadata: Any, parameter: Tensor | None) -> Any:
    """What to load into: cut as its parameter is, where it has a value for each weight; None for what is no tensor."""
    if isinstance(metadata, BytesStorageMetadata):
        return None
    if parameter is not None and tuple(metadata.size) == tuple(parameter.shape) and parameter.dim():
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
    try:
        metadata = reader.read_metadata()
    except UserError:
        raise
    except Exception as error:  # whatever reading makes of a file that is not there or cut short
        raise UserError(f"{folder / PARTS}: has no readable .metadata; {OLDER}") from error
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = folder / PARTS / name
        if not file.is_file() or file.stat().st_size < end:
            raise UserError(f"{file}: this part of the checkpoint is missing or incomplete; {OLDER}")
    return metadata
