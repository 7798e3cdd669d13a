"""A LoRA as a GGUF file, which llama.cpp puts onto its base."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from align.errors import UserError
from align.export.gguf_model import ARCHITECTURES, as_llama_cpp, check_architecture
from align.export.made import Made
from align.export.trained import ADAPTER_FILE, source_of

FILE = "adapter.gguf"
FACTOR = re.compile(r"base_model\.model\.(.*)\.lora_(A|B)\.weight")


def write(made: Made) -> None:
    """The factors of every layer; B carries what a layer's own scaling has more than alpha over the rank.

    Raises:
        UserError: it is no plain LoRA, or of an architecture that is not known.
    """
    import gguf

    trained = made.trained
    config: Any = PeftConfig.from_pretrained(str(trained.folder))
    _check_plain(config, trained.folder)
    base = AutoConfig.from_pretrained(source_of(trained))
    check_architecture(base)
    name = ARCHITECTURES[base.model_type]
    writer = gguf.GGUFWriter(made.folder / FILE, name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(made.name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config.lora_alpha))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], base.num_hidden_layers)
    stored = np.float16 if made.dtype == "float16" else np.float32
    for own, factors in _layers(load_file(trained.folder / ADAPTER_FILE)).items():
        place = names.get_name(f"{own}.weight", try_suffixes=(".weight",))
        if place is None or set(factors) != {"A", "B"} or "embd" in place:
            raise UserError(f"--to lora-gguf: llama.cpp has no place for an adapter on {own}; take --to gguf")
        rank = len(factors["A"])
        b = factors["B"].float() * (scaling(config, own, rank) * rank / config.lora_alpha)
        writer.add_tensor(f"{place}.lora_a", factors["A"].float().numpy().astype(stored))
        writer.add_tensor(f"{place}.lora_b", as_llama_cpp(own, b, base).contiguous().numpy().astype(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def scaling(config: Any, layer: str, rank: int) -> float:
    """By what PEFT multiplies a layer's B A."""
    alpha = next((a for key, a in (config.alpha_pattern or {}).items() if _is(layer, key)), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _is(layer: str, key: str) -> bool:
    """Whether a key of PEFT's patterns means a layer."""
    return re.match(rf"(.*\.)?({key})$", layer) is not None


def _check_plain(config: Any, folder: Path) -> None:
    kind = str(config.peft_type.value if hasattr(config.peft_type, "value") else config.peft_type)
    if kind != "LORA":
        raise UserError(f"--to lora-gguf: {folder} is of type {kind}, and llama.cpp adds LoRA alone; take --to gguf")
    for key in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters"):
        if getattr(config, key, None):
            raise UserError(f"--to lora-gguf: {folder} has `{key}`, which llama.cpp's LoRA lacks; take --to gguf")
    if config.bias != "none" or getattr(config, "lora_bias", False):
        raise UserError(f"--to lora-gguf: {folder} trained biases, which llama.cpp's LoRA lacks; take --to gguf")


def _layers(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A layer's factors by its name in the model."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        match = FACTOR.fullmatch(name)
        if match is None:
            raise UserError(f"--to lora-gguf: {name} is no factor of a plain LoRA; take --to gguf")
        found.setdefault(match[1], {})[match[2]] = tensors[name]
    return found
