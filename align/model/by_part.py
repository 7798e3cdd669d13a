"""A policy of which no process ever holds more than its part: built without weights, cut, and then read by slices."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

from align.errors import UserError
from align.model.adapters import Full, Lora, RsLora
from align.model.config import PolicySection
from align.model.fusing import enable_fusing
from align.model.identity import base_identity
from align.model.load import LoadOptions, empty_model, load_tokenizer, loading, model_folder
from align.model.policy import Policy, freeze_other_parts, make_ready, with_adapter
from align.model.sharding import Sharding, gathered, own_places, shard
from align.progress import stage

log = logging.getLogger("align")


def why_whole(section: PolicySection, folder: Path, base: PreTrainedModel) -> str | None:
    """Why every process must load the whole model before it is cut; None where it may read its part alone.

    Args:
        base: without weights.
    """
    own = section.adapter
    if section.start_adapter is not None or type(own) not in (Lora, RsLora, Full) or own.reads_rows():
        return "the adapter's start is computed from whole weights"
    stored = _places(folder)
    wanted = dict(base.named_parameters()) | dict(_stored_buffers(base))
    for name, value in wanted.items():
        if name not in stored:
            return f"its files name weights otherwise than transformers does, {name} for one"
        with safe_open(stored[name], "pt") as file:
            if file.get_slice(name).get_shape() != list(value.shape):
                return f"its files hold {name} in another shape"
    return None


@stage("loading this process's part of the model")
def load_by_part(section: PolicySection, options: LoadOptions, sharding: Sharding) -> Policy | None:
    """The policy at its start, cut over the processes, with the numbers that `load_policy` would give.

    Returns:
        None where it must be loaded whole, which the log says.

    Raises:
        UserError: as for `load_policy`.
    """
    code = {"trust_remote_code": section.trust_remote_code}
    folder = model_folder(section.model, section.revision, **code)
    with loading(folder, "cannot be loaded as a language model"):
        with init_empty_weights(include_buffers=False):
            base, dropout = empty_model(
                folder, dtype=section.dtype, attention=section.attention, dropout=options.dropout, **code
            )
        base.tie_weights()
        reason = why_whole(section, folder, base)
        if sharding.compute and section.dtype == "float32":
            reason = "its checks need the precision of its weights; policy.dtype: bfloat16 lets each read its part"
    if reason:
        log.warning("every process loads all of %s before it is cut, since %s", section.model, reason)
        return None
    if (folder / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(section.model, revision=section.revision, chat_template=section.chat_template, **code)
    freeze_other_parts(base, name=section.model)
    with torch.random.fork_rng(devices=[]), _adapters_in_memory():
        torch.manual_seed(options.seed)
        trained = with_adapter(base, section, options, folder)
    if not any(p.requires_grad for p in trained.parameters()):
        raise UserError(f"policy.adapter: nothing of {section.model} would train; check its targets")
    identity = {**base_identity(section.model, folder), "quantization": None}
    policy = Policy(trained, tokenizer, adapter=section.adapter.name, base=identity, dropout=dropout, folder=folder)
    shard(policy.scorer(), sharding)
    read_parts(base, folder)
    with gathered(policy.scorer()):
        policy.packing = make_ready(base, options, name=section.model)
        enable_fusing(trained, name=section.model)
    return policy


@torch.no_grad()
def read_parts(base: PreTrainedModel, folder: Path) -> None:
    """Give the weights of a model that has none this process's slices of those in a folder."""
    stored, found = _places(folder), {}
    by_file: dict[Path, list[tuple[str, Tensor]]] = {}
    wanted = dict(_plain_names(base)) | dict(_stored_buffers(base))
    for name, value in wanted.items():
        by_file.setdefault(stored[name], []).append((name, value))
    own_names = {id(value): name for name, value in base.named_parameters()}
    for path, named in by_file.items():
        with safe_open(path, "pt") as file:
            for name, value in named:
                places = own_places(value)
                part = _slice(file, name, places)
                if value.is_meta:
                    found[own_names[id(value)]] = _as_part(part, value)
                else:  # a buffer
                    value.copy_(part)
    base.load_state_dict(found, strict=False, assign=True)
    base.tie_weights()
    if left := [name for name, value in base.named_parameters() if value.is_meta]:
        raise UserError(f"{folder} is incomplete: its safetensors files lack {len(left)} weights, first {left[0]}")


def _slice(file: Any, name: str, places: tuple[slice, ...]) -> Tensor:
    """Part of a stored tensor; safetensors gives no empty ones, which the last process of many may hold."""
    if all(place.stop > place.start for place in places):
        return file.get_slice(name)[places]
    return torch.empty([place.stop - place.start for place in places])


def _as_part(part: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return part.to(parameter.dtype)
    mesh = parameter.device_mesh
    device = "cpu" if parameter.to_local().device.type == "cpu" else mesh.device_type
    own = part.to(device, parameter.dtype).contiguous()
    size, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(own, mesh, parameter.placements, run_check=False, shape=size, stride=stride)


def _plain_names(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The base's own parameters by the names that they have without an adapter around them."""
    for name, value in base.named_parameters():
        if value.is_meta:
            yield name.replace(".base_layer.", "."), value


def _stored_buffers(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds."""
    kept = base.state_dict().keys()
    return ((name, value) for name, value in base.named_buffers() if name in kept)


def _places(folder: Path) -> dict[str, Path]:
    """The file that holds each weight of a folder."""
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


@contextmanager
def _adapters_in_memory() -> Iterator[None]:
    """PEFT moves a new adapter to where its base is, which is nowhere yet; its start is to be drawn as ever."""
    to: Any = nn.Module.to

    def stay(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        nowhere = [isinstance(arg, torch.device) and arg.type == "meta" for arg in args]
        return to(module, *("cpu" if lost else arg for arg, lost in zip(args, nowhere, strict=True)), **kwargs)

    with patch.object(nn.Module, "to", stay):
        yield
