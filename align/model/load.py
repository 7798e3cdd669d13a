"""Model folders -> transformers' models and tokenizers, with one clear sentence where that cannot work."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.errors import UserError

FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled)
LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)

log = logging.getLogger(__name__)


def model_folder(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model; a hub name is downloaded into the hub's cache unless it is there.

    Raises:
        UserError: neither a folder nor a model that the hub gives, or the folder holds an adapter.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model, revision, (*FILES, "*.py") if trust_remote_code else FILES)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{model} holds an adapter, not a whole model: name its base as `policy.model` and this folder as "
            "`policy.start_adapter`"
        )
    if not (folder / "config.json").is_file():
        hint = "; of a run directory, name what `align export` makes" if (folder / "recipe.yaml").is_file() else ""
        raise UserError(f"{model} is no model folder: it has no config.json{hint}")
    return folder


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
    check_weight_files(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        check_kind(folder, config)
        turned_off = {} if dropout else turn_dropout_off(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            quantization_config=_bitsandbytes(dtype) if quantization else None,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"{folder} cannot be loaded as a language model: {first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder} is incomplete: its safetensors files lack {len(missing)} weights, first {missing[0]}"
        )
    return model, turned_off


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
        chat_template: a Jinja file that replaces the tokenizer's chat template.

    Raises:
        UserError: no tokenizer there, no template file there, or neither a padding nor an end-of-text token.
    """
    folder = model_folder(model, revision, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UserError(f"{folder} has no tokenizer that can be loaded: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {folder} has neither a padding nor an end-of-text token: give it one")
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise UserError(f"policy.chat_template: there is no file {chat_template}")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def turn_dropout_off(config: PretrainedConfig) -> dict[str, float]:
    """Set a config's dropout probabilities (attention_dropout, resid_pdrop, ...) to 0; modules read them when built.

    Returns:
        What they were.
    """
    text = config.get_text_config()
    found = {name: value for name, value in text.to_dict().items() if "drop" in name and isinstance(value, float)}
    text.update(dict.fromkeys(found, 0.0))
    return found


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _download(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        skip = ["*/*", "consolidated*"]  # other formats' copies of the weights
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=skip))
    except HUB_ERRORS as error:
        raise UserError(
            f"{model} is not a folder here, and the hub does not give a model of that name: {first_line(error)}"
        ) from error


def check_weight_files(folder: Path) -> None:
    if list(folder.glob("*.safetensors")):
        return
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
        raise UserError(
            f"{folder} has its weights in pickle files only, which can run code when read; convert it once, where you "
            "trust it, with transformers' from_pretrained and save_pretrained, which writes safetensors"
        )
    raise UserError(f"{folder} has no weights: there is no .safetensors file")


def check_kind(folder: Path, config: PretrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise UserError(f"{folder} is an encoder-decoder model ({config.model_type}); a decoder-only model is needed")


def _bitsandbytes(dtype: str) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("policy.quantization: 4bit needs bitsandbytes: pip install bitsandbytes")
    # No double quantisation: LoftQ's start is computed for plain NF4 scales, and it saves 0.4 bits only.
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
