"""What training changed, written and read: for going on bit for bit, and for use elsewhere."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.errors import UserError
from align.model.adapters import MUTATES_BASE
from align.model.attach import REFERENCE, STATE_FILE, TRAINED, adapter_config, adapter_tensors, plain_config, tuner
from align.model.identity import Identity
from align.model.sharding import own_part, own_places, whole
from align.model.streamed import write_tensors
from rewards.files import BASE_KEY
from rewards.loading import without_bars

ADAPTER_FILE = "adapter_model.safetensors"
ALLOCATOR = "allocator."
ALLOCATOR_STATS = ("exp_avg_ipt", "exp_avg_unc")


def save_state(model: PreTrainedModel | PeftModel, folder: Path, *, base: Identity) -> None:
    """Every trainable tensor, the frozen start of the adapter where it has one, and AdaLoRA's statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"base": json.dumps(base)}
    if isinstance(model, PeftModel) and isinstance(adapter_config(model), AdaLoraConfig):
        metadata["rank_pattern"] = json.dumps(adapter_config(model).rank_pattern)
    write_tensors(saved_tensors(model) | _allocator(model), folder / STATE_FILE, metadata)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"{file}: damaged ({error}); remove this checkpoint, and the run goes on from an older one"
        ) from None


@torch.no_grad()
def load_state(
    model: PreTrainedModel | PeftModel, folder: Path, *, base: Identity, keep_reference: bool = False
) -> None:
    """Put `save_state`'s tensors back; with `keep_reference` without the frozen start that may be among them.

    Raises:
        UserError: no such file, another base, or tensors of another adapter.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise UserError(f"{folder} is no checkpoint: it has no {STATE_FILE}")
    with _readable(file), safe_open(file, "pt") as stored:
        metadata = stored.metadata()
        if json.loads(metadata["base"]) != base:
            raise UserError(f"{folder} was trained from another base model than `policy.model` gives; start a new run")
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
        present = saved_tensors(model)
        values = {name: _read(stored, name, present.get(name)) for name in shapes}
    rank_pattern = json.loads(metadata.get("rank_pattern", "null"))
    allocator = {name: values.pop(name) for name in list(values) if name.startswith(ALLOCATOR)}
    if keep_reference:
        present, values = _without_reference(present), _without_reference(values)
    if {n: list(p.shape) for n, p in present.items()} != {n: shapes[n] for n in values}:
        raise UserError(f"{folder} was trained with another adapter than `policy.adapter` describes; start a new run")
    _set_parameters(model, present, values)
    if allocator or rank_pattern:
        _restore_allocator(model, allocator, rank_pattern)


def export_adapter(model: PeftModel, folder: Path, *, base: Identity) -> None:
    """The trained adapter in PEFT's format, for the original base, which its file names by digest or commit.

    Where the adapter's start was taken out of the base, what is written is the difference to that start, a LoRA of
    twice the rank: s B A - s B0 A0 = s [B, -B0] [A; A0]; of the same rank, s (B - B0) A, where A does not train.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = plain_config(adapter_config(model))
    tensors = adapter_tensors(model, TRAINED)
    if start_was_subtracted(model):
        start = adapter_tensors(model, REFERENCE)
        both = {name: (whole(value), whole(start[name])) for name, value in tensors.items()}
        if all(torch.equal(*own) for name, own in both.items() if "lora_A" in name):
            tensors = {name: own - first if "lora_B" in name else own for name, (own, first) in both.items()}
        else:
            tensors = {name: _beside(name, *own) for name, own in both.items()}
            config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
            config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
            config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    is_lora = type(config) is LoraConfig and not config.target_parameters  # for fused experts PEFT has its own patterns
    if is_lora and (config.rank_pattern or config.alpha_pattern):
        _scale_alike(model, config, tensors)
    config.inference_mode = True
    # One key alone: safetensors writes several in any order, and the same adapter would be other bytes.
    metadata = {BASE_KEY: json.dumps({name: base[name] for name in ("base", "commit")})}
    write_tensors(tensors, folder / ADAPTER_FILE, metadata)
    if PartialState().is_main_process:
        for name, value in vars(config).items():
            if isinstance(value, set):  # whose order is another in every process
                setattr(config, name, sorted(value))
        config.save_pretrained(str(folder))


def _scale_alike(model: PeftModel, config: Any, tensors: dict[str, Tensor]) -> None:
    """Scale every B so that the config's alpha / r is every layer's scaling: vLLM reads no patterns of alphas."""
    common = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    for layer, module in model.named_modules():
        if not isinstance(module, LoraLayer) or TRAINED not in module.scaling:
            continue
        rank, name = len(tensors[f"{layer}.lora_A.weight"]), layer.removeprefix("base_model.model.")
        b = f"{layer}.lora_B.weight"
        tensors[b] = (whole(tensors[b]).float() * (module.scaling[TRAINED] / common)).to(tensors[b].dtype)
        config.rank_pattern[name] = rank
        config.alpha_pattern[name] = common * (rank**0.5 if config.use_rslora else rank)
    for pattern in (config.rank_pattern, config.alpha_pattern):
        for key in [key for key in pattern if key not in dict(model.get_base_model().named_modules())]:
            del pattern[key]


def export_model(model: PreTrainedModel, folder: Path, *, dropout: dict[str, float]) -> None:
    """A whole model; its config gets back the dropout that was off while it trained."""
    config = model.config.get_text_config()
    present = {name: getattr(config, name) for name in dropout}
    try:
        config.update(dropout)
        with without_bars():
            if any(isinstance(p, DTensor) for p in model.parameters()):
                _export_gathered(model, folder)
            else:
                model.save_pretrained(folder)
    finally:
        config.update(present)


def _export_gathered(model: PreTrainedModel, folder: Path) -> None:
    """A whole model out of its parts, of which one tensor at a time is whole, in one file; every process calls this."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())  # a shared one once
    tensors |= {name: value for name, value in model.state_dict().items() if name in dict(model.named_buffers())}
    if getattr(model, "_weight_conversions", None):  # files name and cut these weights otherwise than the model does
        tensors = {name: whole(value.detach()).cpu() for name, value in tensors.items()}
    converted = {name: value for name, value in tensors.items() if not isinstance(value, DTensor)}
    if PartialState().is_main_process:
        model.save_pretrained(folder, state_dict=converted)
    if len(converted) < len(tensors):
        write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})


def export_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, source: Path | None = None) -> None:
    """A tokenizer as its model has it: without the padding token that was only borrowed for training.

    Args:
        source: folder of the model; what reads its images or sounds is copied from there.
    """
    borrowed = getattr(tokenizer, "pad_is_borrowed", False)
    try:
        if borrowed:
            tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
    finally:
        if borrowed:
            tokenizer.pad_token = tokenizer.eos_token
    for file in source.glob("*processor*.json") if source else ():
        shutil.copy(file, folder)


def start_was_subtracted(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the base weights lack what the adapter started with (PiSSA, OLoRA)."""
    if not isinstance(model, PeftModel) or not isinstance(config := adapter_config(model), LoraConfig):
        return False
    return REFERENCE in model.peft_config and str(config.init_lora_weights).startswith(MUTATES_BASE)


def saved_tensors(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """What training moves, the frozen start of an adapter, and factors that were computed for it once."""
    of_ours = (f".lora_A.{TRAINED}.", f".lora_B.{TRAINED}.", f".beft_bias.{TRAINED}.")
    fixed = {name: b for name, b in model.named_buffers() if any(own in name for own in of_ours)}
    return {n: p for n, p in model.named_parameters() if p.requires_grad or f".{REFERENCE}" in n} | fixed


def _without_reference(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if f".{REFERENCE}" not in name}


def _set_parameters(model: PreTrainedModel | PeftModel, present: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy the values in; if the stored start is not the present one (another machine's SVD), move the base with it."""
    moved: list[tuple[Any, Tensor]] = []
    if start_was_subtracted(model):
        layers: list[tuple[str, Any]] = [
            (n, layer) for n, layer in model.named_modules() if isinstance(layer, LoraLayer)
        ]
        differing = [layer for name, layer in layers if _start_differs(name, present, values)]
        moved = [(layer, layer.get_delta_weight(REFERENCE)) for layer in differing]
    for name, parameter in present.items():
        own_part(parameter).copy_(values[name])
    for layer, before in moved:
        weight = layer.get_base_layer().weight
        weight.copy_(weight.float() + before - layer.get_delta_weight(REFERENCE))


def _start_differs(layer: str, present: dict[str, Tensor], values: dict[str, Tensor]) -> bool:
    names = [f"{layer}.{factor}.{REFERENCE}.weight" for factor in ("lora_A", "lora_B")]
    return any(not torch.equal(own_part(present[name]).cpu(), values[name]) for name in names)


def _read(stored: Any, name: str, parameter: Tensor | None) -> Tensor:
    """What this process holds of a stored tensor; all of it where there is no parameter of its name and shape."""
    if parameter is None or list(parameter.shape) != stored.get_slice(name).get_shape() or not parameter.dim():
        return stored.get_tensor(name)
    return stored.get_slice(name)[own_places(parameter)]


def _allocator(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """AdaLoRA's running importance of every weight."""
    if not isinstance(model, PeftModel) or not isinstance(adapter_config(model), AdaLoraConfig):
        return {}
    allocator = tuner(model).rankallocator
    stats = {key: getattr(allocator, key) for key in ALLOCATOR_STATS}
    return {f"{ALLOCATOR}{key}.{name}": value for key, values in stats.items() for name, value in values.items()}


def _restore_allocator(
    model: PreTrainedModel | PeftModel, tensors: dict[str, Tensor], rank_pattern: dict | None
) -> None:
    allocator = tuner(model).rankallocator
    device = next(model.parameters()).device
    for key in ALLOCATOR_STATS:
        prefix = f"{ALLOCATOR}{key}."
        own = {n.removeprefix(prefix): v.to(device) for n, v in tensors.items() if n.startswith(prefix)}
        setattr(allocator, key, own)
    allocator.ipt = {name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()}
    adapter_config(model).rank_pattern = rank_pattern


def _beside(name: str, trained: Tensor, start: Tensor) -> Tensor:
    if "lora_" not in name:  # a reward model's head, which is stored whole
        return trained
    return torch.cat([trained, start], dim=0) if "lora_A" in name else torch.cat([trained, -start], dim=1)
