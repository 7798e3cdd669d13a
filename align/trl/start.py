"""What a trainer is given, made into what it works with: the model, the tokenizer, the reference."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from align.errors import UserError
from align.trl.answers import REFUSED, WITHOUT_EFFECT
from align.trl.engine import REFERENCE

log = logging.getLogger("align")


def arguments(of_constructor: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """What a constructor was given, by name, for the one that all trainers have.

    Args:
        of_constructor: its `locals()`, before it has others.
    """
    return {name: own for name, own in of_constructor.items() if name not in ("self", "__class__", *without)}


def default_args(config: Any, model: Any, name: str) -> Any:
    """The configuration of a trainer that is given none: all defaults, in a folder named after the model."""
    model = model if isinstance(model, str) else model.config._name_or_path
    return config(f"{model.split('/')[-1]}-{name}")


def refuse_images(row: Mapping[str, Any], *, trainer: str) -> None:
    """Refuse rows with images by name.

    Raises:
        UserError: names TRL's trainer as the remedy.
    """
    if {"image", "images"} & row.keys():
        raise UserError(f"rows with images are not supported; use trl.{trainer} for them")


def refuse_encoder_decoder(model: Any, *, trainer: str) -> None:
    """Refuse a model with an encoder, whose prompts are no beginning of a row.

    Raises:
        UserError: names what takes it.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{trainer}: {type(model).__name__}: {REFUSED['is_encoder_decoder']}")


def refuse_empty(dataset: Any, args: Any) -> Any:
    """A prepared data set, if rows are left of it.

    Raises:
        UserError: none are.
    """
    if isinstance(dataset, Dataset) and not len(dataset):
        raise UserError(f"train_dataset: no row is left: all are too long for max_length={args.max_length}")
    return dataset


def check_train_dataset(dataset: Any, args: Any) -> None:
    """Refuse what is no data set; a stream is not dispatched from one process, which would join ragged batches.

    Raises:
        ValueError, TypeError: as TRL does.
    """
    if dataset is None:
        raise ValueError("`train_dataset` is required")
    if isinstance(dataset, IterableDataset):
        args.accelerator_config.dispatch_batches = False
    elif not isinstance(dataset, Dataset):
        raise TypeError(f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`.")


def load_by_name(
    name: str, options: Mapping[str, Any], *, architecture: Any = None, default_dtype: str = "float32"
) -> Any:
    """from_pretrained of a model's own class, in float32 unless `dtype` says otherwise."""
    options = dict(options)
    dtype = options.get("dtype", default_dtype)
    options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    on_cpu = PartialState().device.type in ("cpu", "mps")
    options.setdefault("device_map", None if on_cpu else "auto")
    if architecture is None:
        config = AutoConfig.from_pretrained(name, trust_remote_code=options.get("trust_remote_code", False))
        architecture = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    return architecture.from_pretrained(name, **options)


def load_options(args: Any, quantization_config: Any) -> dict[str, Any]:
    """Keywords of from_pretrained that a configuration and a trainer's argument ask for.

    Raises:
        ValueError: both give a quantization.
    """
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("`quantization_config` is both an argument and in `args.model_init_kwargs`: give it once")
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return options


def is_quantized(model: Any) -> bool:
    """Whether a model's weights are of 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def given_model(model: Any, args: Any, quantization_config: Any, *, labels: int | None = None, **loading: Any) -> Any:
    """The model that trains: loaded by its name, or the object as it is.

    Args:
        labels: outputs of a classifier's head.
        loading: as load_by_name's.

    Raises:
        ValueError: a quantization for a model that is there already.
    """
    if model is None:
        raise UserError("model: missing; give a name, a transformers model or a PEFT model")
    if isinstance(model, str):
        own = {} if labels is None else {"num_labels": labels}
        return load_by_name(model, load_options(args, quantization_config) | own, **loading)
    if args.model_init_kwargs is not None:
        log.warning("model_init_kwargs has no effect: the model is an object already")
    if quantization_config is not None:
        raise ValueError("`quantization_config` applies to a model given by its name; this one is an object already")
    return model


def given_tokenizer(processing_class: Any, model: Any, args: Any, *, trainer: str) -> PreTrainedTokenizerBase:
    """The tokenizer, loaded from the model's name where none is given, with a pad token.

    Raises:
        TypeError: it is none.
        ValueError: the pad token is not in its vocabulary.
    """
    if processing_class is None:
        revision = dict(args.model_init_kwargs or {}).get("revision")
        name = model.config._name_or_path
        processing_class = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=args.trust_remote_code
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError("The `processing_class` must be either a `PreTrainedTokenizerBase` or a `ProcessorMixin`")
    if tokenizer is not processing_class:
        log.warning("a processor was given: its tokenizer is used, on text; use trl.%s for images", trainer)
    pad = args.pad_token if getattr(args, "pad_token", None) else tokenizer.pad_token or tokenizer.eos_token
    if pad not in tokenizer.get_vocab():
        raise ValueError(f"The specified `pad_token` ('{pad}') is not found in the vocabulary of the tokenizer")
    tokenizer.pad_token = pad
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def with_adapter(model: Any, peft_config: Any, args: Any, *, keeps_start: bool) -> Any:
    """The model with a new adapter, or with a copy of the one that it has, by TRL's name, as the reference.

    Args:
        keeps_start: whether an adapter that is there already is measured from.

    Raises:
        TypeError, ValueError: as TRL does.
    """
    quantized = is_quantized(model)
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"`peft_config` must be a `peft.PeftConfig` instance, got {type(peft_config).__name__}.")
        if isinstance(model, PeftModel):
            raise ValueError(
                "You passed a `PeftModel` instance together with a `peft_config`: merge and unload the adapter that "
                "it has first, or leave `peft_config` out to train that one on"
            )
        model = get_peft_model(model, peft_config)
    elif isinstance(model, PeftModel) and keeps_start and REFERENCE not in model.peft_config:
        _keep_copy(model)
    if isinstance(model, PeftModel):
        _check_trains(model)
    if quantized:
        _in_bfloat16(model)
    return model


def _keep_copy(model: PeftModel) -> None:
    (active,) = model.active_adapters
    model.add_adapter(REFERENCE, model.peft_config[active])
    for name, parameter in model.named_parameters():
        if f".{active}." in name:
            model.get_parameter(name.replace(f".{active}.", f".{REFERENCE}.")).data.copy_(parameter.data)


def _in_bfloat16(model: nn.Module) -> None:
    """What trains on top of quantized weights; DoRA's magnitudes move by less than bfloat16 can say."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def _check_trains(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("nothing of the model would train: load the adapter with is_trainable=True")


def without_dropout(model: nn.Module) -> None:
    """Every dropout off, an adapter's too, as TRL does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


def take_older(older: dict[str, Any], args: Any, *, trainer: str) -> dict[str, Any]:
    """Arguments of a constructor of an older release: put into the configuration, told of, or refused.

    Returns:
        Those that are the transformers Trainer's.

    Raises:
        UserError: one that cannot be taken; TypeError: one that never was.
    """
    passed = {}
    for name, value in older.items():
        if name == "preprocess_logits_for_metrics":
            passed[name] = value
        elif name in REFUSED and value is not None:
            raise UserError(f"{name}: {REFUSED[name]}")
        elif name in WITHOUT_EFFECT:
            log.warning("%s has no effect: %s", name, WITHOUT_EFFECT[name])
        elif name in ("model_init", "formatting_func", "max_target_length"):
            raise UserError(f"{name}: no release of TRL 1 takes it; use {_INSTEAD[name]}")
        elif hasattr(args, name):
            log.info("%s is a field of %s now; the argument is taken for it", name, type(args).__name__)
            setattr(args, name, [value] if name == "loss_type" and isinstance(args.loss_type, list) else value)
        else:
            raise TypeError(f"{trainer}.__init__() got an unexpected keyword argument {name!r}")
    return passed


_INSTEAD = {
    "model_init": "the name or the object of a model as `model`",
    "formatting_func": "`dataset.map` before the trainer",
    "max_target_length": "max_completion_length of the configuration",
}
