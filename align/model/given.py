"""Models that a caller has as objects: each takes the place of a folder's files, which hold the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.errors import UserError

_models: dict[Path, PreTrainedModel] = {}


@contextmanager
def in_place_of(folder: Path | None, model: PreTrainedModel | None) -> Iterator[None]:
    """Inside, whoever loads the model of the folder gets the object; with None of either nothing changes."""
    if folder is None or model is None:
        yield
        return
    _models[folder.resolve()] = model
    try:
        yield
    finally:
        del _models[folder.resolve()]


def object_of(folder: Path) -> PreTrainedModel | None:
    """The object that stands for a folder, if one does."""
    return _models.get(folder.resolve())


def check_model(model: Any) -> None:
    """Refuse what is no language model with weights of its own.

    Raises:
        UserError: says what to give.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"model: {type(model).__name__} is no transformers.PreTrainedModel or peft.PeftModel; give what "
            "AutoModelForCausalLM.from_pretrained returns, or name its folder as policy.model"
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            "model: an adapter's layers are in it already, as they are after a run; load it anew, or give the PeftModel"
        )
    if getattr(model, "hf_quantizer", None) is not None or any(p.is_meta for p in model.parameters()):
        raise UserError(
            "model: its weights are quantised, or not in memory; name its folder as policy.model (with "
            "policy.quantization: 4bit)"
        )


def without_dropout(model: nn.Module) -> None:
    """Every dropout of a model that is built already turned off."""
    for module in model.modules():
        rates = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        for name in (*rates, *(["p"] if isinstance(module, nn.Dropout) else [])):
            setattr(module, name, 0.0)


def has_weights_of(model: PreTrainedModel, folder: Path) -> bool:
    """Whether a folder's safetensors hold an object's weights, but for a rounding to the object's dtype."""
    own: dict[str, Tensor] = model.state_dict()
    found: set[int] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = own.get(name)
                if tensor is None or list(tensor.shape) != stored.get_slice(name).get_shape():
                    return False
                if not tensor.cpu().equal(stored.get_tensor(name).to(tensor.dtype)):
                    return False
                found.add(tensor.data_ptr())
    return bool(found) and all(tensor.data_ptr() in found for tensor in own.values())


def is_same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers read and render alike."""
    return _says(one) == _says(other)


def _says(tokenizer: Any) -> tuple[Any, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return content, tokenizer.special_tokens_map, tokenizer.chat_template, len(tokenizer)
