"""Adapters onto models, new or old; with a frozen copy of the start where the reference needs one."""

import importlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.errors import UserError
from align.model.adapters import Adapter, Decomposed, Eva, Lora, Sized
from align.model.config import PolicySection
from align.model.load import LOAD_ERRORS, LoadOptions, first_line, model_name
from align.model.middle import folded
from align.model.peft_adapter import Peft
from align.model.peft_kinds import KINDS
from align.model.ranks import by_rows
from align.model.targets import chosen_layers

STATE_FILE = "policy.safetensors"
"""What a checkpoint holds of the policy."""
TRAINED = "default"
REFERENCE = "reference"
"""Name of the frozen copy of the adapter's start."""

CONTINUABLE = ("LORA", "MISS", "IA3")
"""PEFT's types of adapters that can be gone on with: AdaLoRA's schedule belongs to one run."""

log = logging.getLogger(__name__)


def attach_adapter(
    base: PreTrainedModel,
    adapter: Adapter,
    section: PolicySection,
    options: LoadOptions,
    *,
    folder: Path,
    head: Sequence[str] | None = None,
) -> PeftModel:
    """A new adapter on a base model; where its start is not the identity, with a frozen copy of it.

    Args:
        section: names the base as the user does, which is written into the adapter's config.
        options: of it, `total_steps` for AdaLoRA's schedule; `init_batches`, for EVA to look at the layers' inputs, or
            `like`, whose ranks EVA then takes instead.
        folder: the base's files; LoftQ compares with the weights in them.
        head: modules of a reward model that train whole beside the adapter.

    Raises:
        UserError: the adapter does not suit the model, or lacks what it needs.
    """
    if adapter.reads_rows() and options.init_batches is None and options.like is None:
        raise UserError(f"policy.adapter: {adapter.name} starts from training rows, and none were given")
    try:
        config: Any = adapter.peft(total_steps=options.total_steps)
        if head is not None:
            config.task_type, config.modules_to_save = "SEQ_CLS", list(head)
        config.target_modules = chosen_layers(base, config.target_modules, adapter)
        patterns = {**(getattr(config, "rank_pattern", None) or {}), **(getattr(config, "alpha_pattern", None) or {})}
        _share_ranks(base, config, adapter, options)
        # PEFT writes the model's own name, which is the folder of a download for a hub model.
        base.name_or_path = model_name(section.model)
        config.revision = section.revision
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected that the base layer has no bias")  # said where it is merged
            wrapped = get_peft_model(base, config, adapter_name=TRAINED)
    except (ValueError, RuntimeError, TypeError, ImportError, re.error) as error:
        raise UserError(f"policy.adapter: {adapter.name} does not fit {section.model}: {first_line(error)}") from error
    _check_patterns(wrapped, patterns)
    _check_head(wrapped, mutates=adapter.mutates_base)
    if adapter.start:
        loaded = adapter.reads_rows() and options.like is not None
        batches = None if loaded else list(options.init_batches or ())
        start_of(adapter)(wrapped, adapter, folder=folder, batches=batches, loss=options.init_loss, like=options.like)
    if isinstance(adapter, Decomposed):
        _check_rank(wrapped, adapter)
    if isinstance(adapter, Peft):
        _check_saved(wrapped)
        if adapter.type not in KINDS:
            log.warning("policy.adapter: whether %s treats every token alone was not tried here", adapter.type)
    if adapter.moves_start():
        freeze_copy(wrapped)
    return wrapped


def start_of(adapter: Adapter) -> Callable[..., None]:
    """The function that its `start` names."""
    module, function = adapter.start.split(":")
    return getattr(importlib.import_module(f"align.model.{module}"), function)  # type: ignore[no-any-return]


def _check_saved(wrapped: PeftModel) -> None:
    """Refuse an adapter whose tensors are views of each other, which safetensors cannot hold."""
    places = [tensor.untyped_storage().data_ptr() for tensor in adapter_tensors(wrapped, TRAINED).values()]
    if len(set(places)) < len(places):
        raise UserError(
            f"policy.adapter: {adapter_config(wrapped).peft_type.value} keeps tensors that share memory, which "
            "safetensors cannot hold; set `save_projection: false`, or take another type"
        )


def _check_patterns(wrapped: PeftModel, patterns: Mapping[str, Any]) -> None:
    """Refuse a pattern that PEFT would find no layer for, and say nothing."""
    names = [name for name, module in wrapped.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]
    for key in patterns:
        if not any(get_pattern_key([key], name) == key for name in names):
            raise UserError(
                f"policy.adapter: a pattern of ranks or alphas names {key}, and no layer of it is called so"
            )


def _check_rank(wrapped: PeftModel, adapter: Decomposed) -> None:
    """A decomposition has no more directions than its weight; PEFT silently takes those that there are."""
    for name, tensor in adapter_tensors(wrapped, TRAINED).items():
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        asked = adapter.rank_pattern.get(get_pattern_key(list(adapter.rank_pattern), layer), adapter.rank)
        if "lora_A" in name and len(tensor) < asked:
            raise UserError(
                f"policy.adapter.rank: {asked} is more than {layer} has directions; give at most {len(tensor)}"
            )


def continue_adapter(base: PreTrainedModel, start_adapter: str, *, instead_of: Adapter) -> PeftModel:
    """An existing adapter, trainable, with a frozen copy of itself.

    Args:
        start_adapter: its folder.
        instead_of: the recipe's adapter, which must be the default, since the folder says what this one is.

    Raises:
        UserError: no safetensors adapter there, or it does not fit the base.
    """
    if instead_of != Lora():
        raise UserError(
            "policy: `adapter` describes a new adapter and `start_adapter` names an old one; keep one of them"
        )
    folder = Path(start_adapter).expanduser()
    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            raise UserError(f"policy.start_adapter: {folder} is no adapter in PEFT's format: it has no {file.name}")
    try:
        with safe_open(weights, "pt") as tensors:
            stored = set(tensors.keys())
            _refuse_unlike(json.loads((folder / "adapter_config.json").read_text()), folder)
        wrapped = PeftModel.from_pretrained(base, folder, adapter_name=TRAINED, is_trainable=True)
    except LOAD_ERRORS as error:
        raise UserError(f"policy.start_adapter: {folder} does not fit the base: {first_line(error)}") from error
    kind = adapter_config(wrapped).peft_type
    if kind not in CONTINUABLE:
        raise UserError(f"policy.start_adapter: {folder} is of type {kind}; only {', '.join(CONTINUABLE)} can go on")
    if odd := stored ^ set(adapter_tensors(wrapped, TRAINED)):
        raise UserError(
            f"policy.start_adapter: {folder} was made for another base: {len(odd)} weights have "
            f"no counterpart, first {min(odd)}"
        )
    check_loaded(wrapped, weights)
    _check_head(wrapped, mutates=False)
    freeze_copy(wrapped)
    return wrapped


def _refuse_unlike(config: dict[str, Any], folder: Path) -> None:
    """Refuse adapters that train weights of the base itself, of which no frozen copy can stand beside."""
    for key, none in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
        if config.get(key) not in (none, None, [], {}):
            raise UserError(
                f"policy.start_adapter: {folder} has `{key}: {config[key]}`, weights of the base that a reference "
                "cannot keep beside trained ones; merge it (`align export ADAPTER OUTPUT --to transformers`) and name "
                "the result as `policy.model`"
            )


def check_loaded(wrapped: PeftModel, weights: Path) -> None:
    """Refuse an adapter of which PEFT has left weights out: it renames those of some architectures and finds them not.

    Raises:
        UserError: names a weight.
    """
    present = adapter_tensors(wrapped, TRAINED)
    with safe_open(weights, "pt") as stored:
        for name in present.keys() & set(stored.keys()):
            if not torch.equal(present[name].cpu(), stored.get_tensor(name).to(present[name].dtype)):
                raise UserError(f"{weights}: PEFT does not read {name} into {type(wrapped.get_base_model()).__name__}")


def freeze_copy(wrapped: PeftModel) -> None:
    """Add the trained adapter's present weights as a second, frozen adapter."""
    config = plain_config(adapter_config(wrapped))
    config.inference_mode = True
    wrapped.add_adapter(REFERENCE, config)
    set_peft_model_state_dict(wrapped, adapter_tensors(wrapped, TRAINED), adapter_name=REFERENCE)
    for name, parameter in wrapped.named_parameters():
        if f".{REFERENCE}" in name:
            parameter.requires_grad_(False)


def plain_config(config: peft.PeftConfig) -> peft.PeftConfig:
    """A copy of an adapter's config that says nothing of how its weights began, since they are given."""
    config = copy(config)
    if isinstance(config, peft.LoraConfig):
        config.init_lora_weights = True
        config.eva_config = None
    return config


def adapter_tensors(wrapped: PeftModel, name: str) -> dict[str, Tensor]:
    """An adapter's weights under the names they have in PEFT's files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LoRA tensor.* have invalid shape")  # a middle's diagonal
        return folded(get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False))


def adapter_config(wrapped: Any) -> Any:
    """The trained adapter's config, whose class has more fields than PEFT's types say."""
    return wrapped.peft_config[TRAINED]


def tuner(wrapped: Any) -> Any:
    """PEFT's object behind the model, with the methods of its kind of adapter."""
    return wrapped.base_model


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that an adapter acts in."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def adapter_state(layers: list[nn.Module], **state: Any) -> Iterator[None]:
    """Set adapter layers' state and put it back. PEFT's own setters change requires_grad too, which training reads."""
    before = [{key: getattr(layer, key) for key in state} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(state)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            vars(layer).update(old)


def _share_ranks(base: PreTrainedModel, config: Any, adapter: Adapter, options: LoadOptions) -> None:
    """Set the ranks of a LoRA that has them from its rows: those of a state, or else by the first lists."""
    by = adapter.ranks if isinstance(adapter, Sized) else None
    if options.like is not None and (by or isinstance(adapter, Eva)):
        config.init_lora_weights, config.eva_config = True, None
        _set_ranks(config, _ranks_of(options.like))
    elif by:
        _set_ranks(config, by_rows(base, config.target_modules, by, config.r, options))


def _ranks_of(state: Path) -> dict[str, int]:
    """The rank of every layer of a LoRA in a state."""
    ending = f".lora_A.{TRAINED}.weight"
    with safe_open(state / STATE_FILE, "pt") as stored:
        names = [name for name in stored.keys() if name.endswith(ending)]  # noqa: SIM118
        return {
            n.removeprefix("base_model.model.").removesuffix(ending): stored.get_slice(n).get_shape()[0] for n in names
        }


def _set_ranks(config: Any, ranks: Mapping[str, int]) -> None:
    """Give a LoRA's config these layers with these ranks, and all of them the scaling of `r`, but for rsLoRA's."""
    config.target_modules, config.rank_pattern = list(ranks), dict(ranks)
    if not config.use_rslora:
        config.alpha_pattern = {name: config.lora_alpha * rank / config.r for name, rank in ranks.items()}


def _check_head(wrapped: PeftModel, *, mutates: bool) -> None:
    """The head is read as weights, not called, so an adapter on it must be one that linear_logprobs knows."""
    base: Any = wrapped.get_base_model()
    head = base.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return
    plain = isinstance(head, LoraLinear) and not head.lora_variant and _has_no_dropout(head)
    if not plain:
        raise UserError(
            "policy.adapter: on the LM head only lora and rslora without dropout work; leave it out of targets"
        )
    if mutates and base.config.get_text_config().tie_word_embeddings:
        raise UserError("policy.adapter: the LM head shares its weight with the embeddings; leave it out of targets")


def _has_no_dropout(head: LoraLinear) -> bool:
    return isinstance(head.lora_dropout[TRAINED], nn.Identity)
