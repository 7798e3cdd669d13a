"""The model that a recipe trains, without weights: every parameter has its shape, its dtype and whether it trains."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from align.bounds import check_folder
from align.errors import UserError
from align.model.adapters import Full
from align.model.attach import start_of
from align.model.classifier import is_classifier, name_outputs
from align.model.config import PolicySection
from align.model.forward import base_model, language_part
from align.model.load import auto_class, choose_attention, first_line, loading, model_folder, turn_dropout_off
from align.model.middle_adapters import MIDDLES
from align.model.targets import chosen_layers
from align.packing import ATTENTION
from align.packing.states import take_trees
from align.recipe import Recipe


class Unplanned(UserError):
    """What a run needs cannot be known before its weights are read; it may well be trained."""


def read_config(policy: PolicySection) -> PretrainedConfig:
    """The config of the recipe's model; of one on the hub, no other file is fetched.

    Raises:
        UserError: no such model, or its config cannot be read.
    """
    code = {"trust_remote_code": policy.trust_remote_code}
    if Path(policy.model).expanduser().exists() or policy.model.startswith(("/", "~", "./", "../")):
        folder = str(model_folder(policy.model, policy.revision, **code))
    else:
        folder = policy.model
    with loading(Path(folder), "has a config that cannot be read"):
        return AutoConfig.from_pretrained(folder, revision=policy.revision, **code)


def empty_model(recipe: Recipe, config: PretrainedConfig, *, total_steps: int, layers: int | None = None) -> nn.Module:
    """The recipe's model with its adapter on the meta device, its frozen weights in the dtype that training holds.

    Adapters whose start is computed from weights or rows (pissa, olora, eva) get plain factors of the same shapes; eva
    and `ranks` move rank between layers afterwards, which changes their number by what these layers differ in width.

    Args:
        layers: only so many of its layers.

    Raises:
        Unplanned: PEFT reads the weights to make the adapter.
        UserError: transformers cannot make it, or the adapter does not fit.
    """
    policy = recipe.policy
    config = deepcopy(config)
    if layers is not None:
        _shorten(config.get_text_config(), layers)
    with loading(Path(policy.model), "has a config that cannot be planned with"):
        base = _base(recipe, config, choose_attention(Path(policy.model), config, policy.attention))
    if recipe.task != "reward":
        is_language = language_part(base)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(is_language(name))
    model = base if _is_whole(recipe) else _with_adapter(recipe, base, total_steps)
    if recipe.train.precision == "bfloat16":
        _hold_frozen(model, published=config.get_text_config().dtype)
    return model


def _shorten(text: Any, layers: int) -> None:
    """Keep a config's first layers, and what it says of each of them."""
    of_each = {n: v for n, v in vars(text).items() if isinstance(v, list) and len(v) == text.num_hidden_layers}
    text.num_hidden_layers = layers
    for name, values in of_each.items():
        setattr(text, name, values[:layers])


def period(config: PretrainedConfig) -> int:
    """After how many layers their kinds begin again."""
    text: Any = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["alike"] * text.num_hidden_layers
    return next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))


def _is_whole(recipe: Recipe) -> bool:
    return isinstance(recipe.policy.adapter, Full) and recipe.policy.start_adapter is None


def _base(recipe: Recipe, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    policy = recipe.policy
    if not recipe.train.dropout:
        turn_dropout_off(config)
    kind = auto_class(config)
    if recipe.task == "reward":
        kind = AutoModelForSequenceClassification
        if not is_classifier(config):
            name_outputs(config, recipe.reward.outputs)
    options: dict[str, Any] = {"trust_remote_code": policy.trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    with torch.device("meta"):
        base = kind.from_config(config, dtype=getattr(torch, policy.dtype), **options)
    own = base.config.get_text_config()._attn_implementation
    if recipe.train.packing and own in ATTENTION:
        base.set_attn_implementation(ATTENTION[own])
        take_trees(base)
    return base


def _with_adapter(recipe: Recipe, base: PreTrainedModel, total_steps: int) -> nn.Module:
    policy = recipe.policy
    if policy.start_adapter is not None:
        check_folder(Path(policy.start_adapter).expanduser())
        with loading(Path(policy.start_adapter), "has an adapter's config that cannot be read"):
            config: Any = peft.PeftConfig.from_pretrained(policy.start_adapter)
        config.inference_mode = False
    else:
        try:
            config = policy.adapter.peft(total_steps=max(total_steps, 2))
        except ImportError as error:
            raise UserError(f"policy.adapter: {first_line(error)}") from error
    if getattr(config, "init_lora_weights", True) not in (True, False):
        config.init_lora_weights, config.eva_config = True, None
    if recipe.task == "reward":
        head = [name for name, child in base.named_children() if name != base.base_model_prefix]
        config.task_type = "SEQ_CLS"
        config.modules_to_save = [n for n in head if any(True for _ in base.get_submodule(n).parameters())]
    with loading(Path(policy.model), "does not take the adapter"):
        config.target_modules = chosen_layers(base, config.target_modules, policy.adapter)
        try:
            # what PEFT moves there from elsewhere becomes trainable, AdaLoRA's ranks as well
            with torch.device("meta"):
                wrapped = peft.get_peft_model(base, config)
        except RuntimeError as error:  # torch's, of an operation that needs values
            kind = config.peft_type.value
            raise Unplanned(
                f"policy.adapter: no plan can be made of {kind}, which PEFT makes out of the weights"
            ) from error
    if policy.start_adapter is None and isinstance(policy.adapter, MIDDLES):
        start_of(policy.adapter)(wrapped, policy.adapter, batches=None, loss=None, like=None)
    return wrapped


def _hold_frozen(model: nn.Module, *, published: Any) -> None:
    """As `align.model.precision.hold_frozen` would; the embedding where the checkpoint was published in bfloat16."""
    half = torch.bfloat16
    embedding: Any = base_model(model).get_input_embeddings()
    exact = not embedding.weight.requires_grad and published == half
    if exact:
        embedding.register_forward_hook(lambda module, inputs, output: output.float())
        embedding.weight.data = embedding.weight.data.to(half)
    for layer in model.modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad and layer.weight is not embedding.weight:
            layer.weight.data = layer.weight.data.to(half)
