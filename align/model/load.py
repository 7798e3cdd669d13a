"""Model folders -> transformers' models and tokenizers, with one clear sentence where that cannot work."""

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from align.bounds import check_folder
from align.consent import REMOTE
from align.errors import UserError
from align.files import is_there, with_home
from align.model.given import object_of, without_dropout
from align.progress import stage
from align.shipped import template_file
from align.types import ListBatch, TokenStats
from rewards.loading import HUB_ERRORS, LOAD_ERRORS, unread_problem, without_bars
from rewards.positions import table_size

FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")

log = logging.getLogger("align")


@dataclass(frozen=True)
class LoadOptions:
    """What a run tells its model besides the recipe's `policy` section."""

    dropout: bool = False
    """Keep the model's own dropout in training mode."""
    seed: int = 0
    """Of the random start of an adapter and of a new head."""
    device: torch.device | str = "cpu"
    total_steps: int | None = None
    """Optimizer steps of the run, for AdaLoRA."""
    init_batches: Iterable[ListBatch] | None = None
    """A few batches of training rows, for an adapter that starts from them."""
    init_loss: Callable[[TokenStats, ListBatch], Tensor] | None = None
    """The loss of each of their lists, where the policy is its reference."""
    packing: bool = True
    """Run lists as one row, what their sequences begin with once, where the model allows."""
    like: Path | None = None
    """The state of a run that is loaded into it afterwards, instead of `init_batches`."""


def model_folder(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model; a hub name is downloaded into the hub's cache unless it is there.

    Raises:
        UserError: neither a folder nor a model that the hub gives, the folder holds an adapter, or it is to have a
            revision.
    """
    folder = with_home(model)
    if is_there(folder, Path.is_file):
        raise UserError(f"{model} is a file; give the folder of a model, or a hub name")
    is_here = is_there(folder, Path.is_dir)
    if not is_here and model.startswith(("/", "~", "./", "../")):
        raise UserError(f"{model}: there is no such folder; give the folder of a model, or a hub name")
    if is_here and revision is not None:
        raise UserError(f"policy.revision: {model} is a folder here, and a revision is of a hub model; leave it out")
    if not is_here:
        folder = _download(model, revision, (*FILES, "*.py") if trust_remote_code else FILES)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{model} holds an adapter, not a whole model: name its base as `policy.model` and this folder as "
            "`policy.start_adapter`"
        )
    if not (folder / "config.json").is_file():
        hint = ""
        if (folder / "recipe.yaml").is_file():
            hint = "; of a run directory, name what `align export` makes"
        elif (folder / "adapter").is_dir():
            hint = "; as a run directory it lacks recipe.yaml, so restore that file"
        raise UserError(f"{model} is no model folder: it has no config.json{hint}")
    check_folder(folder)
    return folder


def model_name(model: str) -> str:
    """What names a model from wherever it is read: the whole path of a folder here, or the hub's name."""
    folder = with_home(model)
    return str(folder.absolute()) if is_there(folder, Path.is_dir) else model


def load_model(
    folder: Path,
    *,
    dtype: str,
    attention: str | None,
    quantization: str | None,
    trust_remote_code: bool,
    dropout: bool,
    device: torch.device,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """A causal language model from safetensors, every weight of it found in the files.

    Args:
        dtype: what the weights are held in, by torch's name.
        quantization: "4bit" for bitsandbytes' NF4.
        dropout: keep the model's own dropout; otherwise it is off in training mode too.

    Returns:
        The model, and the dropout probabilities of its config that were turned off.

    Raises:
        UserError: files are missing, damaged, incomplete or of another kind.
    """
    if (own := object_of(folder)) is not None:
        return _taken(own, folder, dropout=dropout, device=device)
    with loading(folder, "cannot be loaded as a language model"):
        config = read_config(folder, trust_remote_code=trust_remote_code)
        turned_off = {} if dropout else turn_dropout_off(config)
        model, missing = read_weights(
            auto_class(config),
            folder,
            config=config,
            dtype=dtype,
            attention=attention,
            device=device,
            trust_remote_code=trust_remote_code,
            quantization_config=_bitsandbytes(dtype) if quantization else None,
        )
    refuse_incomplete(folder, missing)
    return model, turned_off


def empty_model(
    folder: Path, *, dtype: str, attention: str | None, trust_remote_code: bool, dropout: bool
) -> tuple[PreTrainedModel, dict[str, float]]:
    """As `load_model`, without reading a weight: for a context in which weights take no memory."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    turned_off = {} if dropout else turn_dropout_off(config)
    config.name_or_path = str(folder)
    attention = choose_attention(folder, config, attention)
    own = {"attn_implementation": attention} if attention else {}
    held = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    return auto_class(config).from_config(config, **held, **own).eval(), turned_off


def _taken(
    model: PreTrainedModel, folder: Path, *, dropout: bool, device: torch.device
) -> tuple[PreTrainedModel, dict[str, float]]:
    """An object in place of the folder's model, as this would be loaded."""
    turned_off = {} if dropout else turn_dropout_off(model.config)
    if not dropout:
        without_dropout(model)
    if (attention := choose_attention(folder, model.config, None)) is not None:
        model.set_attn_implementation(attention)
    moved: Any = model
    return moved.to(device).eval(), turned_off


@contextmanager
def loading(folder: Path, problem: str) -> Iterator[None]:
    """Whatever transformers makes of a folder's files becomes one sentence: `problem`, and its own first line."""
    try:
        yield
    except UserError:
        raise
    except LOAD_ERRORS as error:
        why = f"it {REMOTE}" if "trust_remote_code" in str(error) else first_line(error)
        if isinstance(error, SafetensorError):
            why = f"a file of its weights is damaged ({why}); fetch the model again"
        raise UserError(f"{folder} {problem}: {why}") from error


def read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a folder that has safetensors, and is not of an encoder-decoder."""
    if not list(folder.glob("*.safetensors")):
        _refuse_weights(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder or config.get_text_config(decoder=True).is_encoder_decoder:
        raise UserError(f"{folder} is an encoder-decoder model ({config.model_type}); a decoder-only model is needed")
    return config


def auto_class(config: PretrainedConfig) -> Any:
    """What reads all of a checkpoint: of one that sees or hears too, its whole class and not the language part."""
    mapped = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    names = [kind.__name__ for kind in (mapped if isinstance(mapped, tuple) else (mapped,)) if kind is not None]
    whole = names and (not config.architectures or config.architectures[0] in names)
    return AutoModelForMultimodalLM if whole else AutoModelForCausalLM


def read_weights(
    auto_class: Any, folder: Path, *, dtype: str, attention: str | None, device: torch.device, **options: Any
) -> tuple[Any, list[str]]:
    """A model of transformers' `auto_class`, and the weights of it that the files lack.

    Raises:
        UserError: the files hold layers that the config does not count.
    """
    with without_bars():
        model, info = auto_class.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=choose_attention(folder, options["config"], attention),
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if problem := unread_problem(folder, model, info["unexpected_keys"]):
        raise UserError(f"{folder}: {problem}")
    return model, sorted(info["missing_keys"])


def choose_attention(folder: Path, config: PretrainedConfig, asked: str | None) -> str | None:
    """Eager, unless another is asked for, where logits of the attention have a soft-cap, which sdpa leaves out."""
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is None or asked not in (None, "sdpa"):
        return asked
    if asked is None:
        log.info("%s: its attention has a soft-cap of %g, so it runs as `policy.attention: eager`", folder, cap)
        return "eager"
    log.warning("%s: sdpa leaves out its attention's soft-cap of %g; set `policy.attention: eager`", folder, cap)
    return asked


def refuse_incomplete(folder: Path, missing: list[str]) -> None:
    """Refuse a folder that lacks weights, which would be drawn at random."""
    if missing:
        raise UserError(
            f"{folder} is incomplete: its safetensors files lack {len(missing)} weights, first {missing[0]}"
        )


def positions(
    model: str, revision: str | None = None, trust_remote_code: bool = False, *, classifier: bool = False
) -> tuple[int | None, int | None]:
    """How many tokens a model's table of positions holds, None without one; and how many its config was made for.

    Known from its config; no weight is read.
    """
    folder = model_folder(model, revision, trust_remote_code=trust_remote_code)
    if (own := object_of(folder)) is not None:
        return table_size(own), getattr(own.config.get_text_config(decoder=True), "max_position_embeddings", None)
    with loading(folder, "has a config that cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    text = config.get_text_config(decoder=True)
    auto = AutoModelForSequenceClassification if classifier else auto_class(config)
    try:
        with torch.device("meta"):
            empty = auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # whatever its code makes of a model without weights; loading it says what is wrong
        return None, getattr(text, "max_position_embeddings", None)
    alibi = getattr(text, "alibi", False)
    return table_size(empty), None if alibi else getattr(text, "max_position_embeddings", None)


def load_tokenizer(
    model: str,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """A model's tokenizer; padding falls back to the end-of-text token.

    Args:
        model: a local folder, or a hub name.
        chat_template: a Jinja file, or `plain`, that replaces the tokenizer's chat template.

    Raises:
        UserError: no tokenizer there, no template file there, or neither a padding nor an end-of-text token.
    """
    folder = model_folder(model, revision, trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {folder} has neither a padding nor an end-of-text token: give it one")
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.pad_is_borrowed = True  # which an export must not say
    if chat_template is not None:
        if not template_file(chat_template).is_file():
            raise UserError(f"policy.chat_template: there is no file {chat_template}; `plain` suits base models")
        tokenizer.chat_template = template_file(chat_template).read_text(encoding="utf-8")
    return tokenizer


def read_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """A folder's tokenizer as it is."""
    with loading(folder, "has no tokenizer that can be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def turn_dropout_off(config: PretrainedConfig) -> dict[str, float]:
    """Set a config's dropout probabilities and the noise of its routers in training (router_jitter_noise) to 0.

    Modules read them when built.

    Returns:
        What they were.
    """
    text = config.get_text_config()
    noise = ("drop",) if text.model_type == "phimoe" else ("drop", "jitter")  # PhiMoE's is a bound in evaluation too
    values = text.to_dict().items()
    found = {n: value for n, value in values if any(part in n for part in noise) and isinstance(value, float)}
    text.update(dict.fromkeys(found, 0.0))
    return found


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@stage("fetching from the hub or its cache")
def _download(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        skip = ["*/*", "consolidated*"]  # other formats' copies of the weights
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=skip))
    except HUB_ERRORS as error:
        raise UserError(
            f"{model} is not a folder here, and the hub does not give a model of that name: {first_line(error)}"
        ) from error


def _refuse_weights(folder: Path) -> None:
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
        raise UserError(
            f"{folder} has its weights in pickle files only, which can run code when read; convert it once, where you "
            "trust it, with transformers' from_pretrained and save_pretrained, which writes safetensors"
        )
    raise UserError(f"{folder} has no weights: there is no .safetensors file")


def _bitsandbytes(dtype: str) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("policy.quantization: 4bit needs bitsandbytes: pip install bitsandbytes")
    # No double quantisation: LoftQ's start is computed for plain NF4 scales, and it saves 0.4 bits only.
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
