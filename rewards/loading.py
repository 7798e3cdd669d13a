"""Models and tokenizers of scorers, from safetensors, with one clear sentence where that cannot work."""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

from align.bounds import check_folder
from align.files import is_there, with_home
from rewards.files import is_of_other_weights
from rewards.positions import table_size
from rewards.types import ScorerError

FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled)
OF_CODE = (LookupError, TypeError, AttributeError, ArithmeticError, StrictDataclassError)
LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, *OF_CODE)
"""Whatever a config of wrong kinds and sizes makes of transformers' own code, too."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

log = logging.getLogger(__name__)


def folder_of(model: str, revision: str | None = None) -> Path:
    """The local folder of a model or adapter; a hub name is downloaded into the hub's cache unless it is there.

    Raises:
        ScorerError: neither a folder nor a name that the hub knows.
        UserError: its configuration is beyond the bounds of any model.
    """
    folder = with_home(model)
    if is_there(folder, Path.is_file):
        raise ScorerError(f"{model} is a file; give the folder of a model, or a hub name")
    if is_there(folder, Path.is_dir):
        if revision is not None:
            raise ScorerError(f"`revision`: {model} is a folder here, and a revision is of a hub model; leave it out")
        check_folder(folder)
        return folder
    try:
        skip = ["*/*", "consolidated*"]  # other formats' copies of the weights
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(FILES), ignore_patterns=skip))
    except HUB_ERRORS as error:
        raise ScorerError(
            f"{model}: cannot be loaded: not a folder here, and the hub gives no model of that name "
            f"({first_line(error)})"
        ) from error
    check_folder(folder)
    return folder


@contextmanager
def without_bars() -> Iterator[None]:
    """Transformers' own bars of reading and writing weights, off inside; afterwards they are as they were."""
    before = set_tqdm_hook(lambda factory, args, kwargs: EmptyTqdm(*args, **kwargs))
    try:
        yield
    finally:
        set_tqdm_hook(before)


def load_model(
    auto_class: Any, folder: Path, *, dtype: str, device: str | None, **config: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model for inference, and which of its weights the files lack or have too many.

    Args:
        auto_class: the transformers class that reads the folder, such as AutoModelForCausalLM.
        config: further keywords of its `from_pretrained`.

    Raises:
        ScorerError: the folder holds no such model, or its weights are in pickle files only.
    """
    kind = auto_class.__name__.removeprefix("AutoModelFor") or "Encoder"
    try:
        read_with = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        if getattr(read_with, "attn_logit_softcapping", None) is not None:  # which sdpa leaves out
            config["attn_implementation"] = "eager"
        with without_bars():
            model, report = auto_class.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                device_map={"": device or default_device()},
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                **config,
            )
    except SafetensorError as error:
        raise ScorerError(f"{folder}: a file of its weights is damaged ({error}); fetch the model again") from error
    except LOAD_ERRORS as error:
        raise ScorerError(f"{folder}: cannot be loaded ({kind}): {first_line(error)}") from error
    if problem := unread_problem(folder, model, report["unexpected_keys"]):
        raise ScorerError(f"{folder}: {problem}")
    return model.eval(), report


def unread_problem(folder: Path, model: PreTrainedModel, unread: Collection[str]) -> str:
    """What is wrong with weights that the files hold and the model has no place for; empty where nothing is.

    Layers behind the last that the config counts are wrong. Others are said with their count: all in a language model;
    in one that is read with another head only those in its layers, since the old head is meant to be left out.

    Args:
        unread: as transformers names them, without those that a model's class ignores by itself.
    """
    more = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0  # that predict further tokens
    lengths = {name: len(own) for name, own in model.named_modules() if isinstance(own, nn.ModuleList)}
    inside, behind = set(), []
    for key in sorted(unread):
        for place, number in _numbered(key):
            length = _length(place, lengths, model.base_model_prefix)
            if number < length:
                inside.add(key)
            elif length and number >= length + more:
                behind.append((key, place, length))
    if behind:
        key, place, length = behind[0]
        return (
            f"its config makes {length} of `{place}`, and its files hold weights of more ({len(behind)}, first {key}), "
            "which would be left out; fetch the config and the weights of one model"
        )
    said = sorted(inside if model.get_output_embeddings() is None else unread)
    if said:
        log.warning("%s: %d weights have no place in the model and are left out, first %s", folder, len(said), said[0])
    return ""


def _numbered(key: str) -> Iterator[tuple[str, int]]:
    """Each list of modules that a weight's name says it lies in, and its number there."""
    parts = key.split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            yield ".".join(parts[:at]), int(part)


def _length(place: str, lengths: Mapping[str, int], prefix: str) -> int:
    """How many modules a list has that files name, with or without the prefix of a model's body; 0 where it is none."""
    names = (place, f"{prefix}.{place}", place.removeprefix(f"{prefix}."))
    return next((lengths[name] for name in names if name in lengths), 0)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer.

    Raises:
        ScorerError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ScorerError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from error


def chat_template_of(folder: Path) -> str | None:
    """The chat template that a folder's tokenizer has, without loading it; of several the first."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
    return str(found[0]["template"]) if isinstance(found, list) else found


def with_adapters(model: PreTrainedModel, adapters: Mapping[str, str]) -> PeftModel:
    """The model with adapters under the given names; adapter -> folder or hub name.

    Raises:
        ScorerError: a folder holds no PEFT adapter in safetensors, or it does not fit the model.
    """
    wrapped: Any = model
    for name, place in adapters.items():
        folder = folder_of(place)
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / file).is_file():
                raise ScorerError(f"{place}: no adapter in PEFT's format and safetensors ({file} is missing)")
        _check_weights_of(folder, Path(model.name_or_path or ""))
        try:
            if isinstance(wrapped, PeftModel):
                wrapped.load_adapter(str(folder), adapter_name=name)
            else:
                wrapped = PeftModel.from_pretrained(wrapped, str(folder), adapter_name=name)
        except LOAD_ERRORS as error:
            raise ScorerError(f"{place}: the adapter does not fit its base: {first_line(error)}") from error
    return wrapped.eval()


def _check_weights_of(adapter: Path, base: Path) -> None:
    """Refuse an adapter whose base was overwritten since it was trained."""
    named = json.loads((adapter / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path") or ""
    same = base.is_dir() and Path(named).expanduser().resolve() == base.resolve()
    if same and is_of_other_weights(adapter / ADAPTER_WEIGHTS, base):
        raise ScorerError(f"{adapter} was trained on other weights than {base} holds now; put the old ones back there")


def named_tensor(folder: Path, name: str) -> Tensor | None:
    """One tensor of a folder's safetensors files, None where no file has it."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                    return tensors.get_tensor(name)
        except SafetensorError as error:
            raise ScorerError(f"{file}: damaged ({error}); fetch the model again") from None
    return None


def context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int | None = None) -> int:
    """Tokens that a model is to read: those that are wanted, as far as its table of positions goes.

    Without a wish as many as tokenizer and model were made for.
    """
    table = table_size(model)
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    longest = wanted or min(tokenizer.model_max_length, made_for if table is None else table)
    return int(longest if table is None else min(longest, table))


def default_device() -> str:
    """A GPU where there is one: the current one, so that each of several processes has its own."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own, which no scorer runs; take a model of transformers' own classes"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
