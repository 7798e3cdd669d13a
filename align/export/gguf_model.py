"""A whole model as a GGUF file, written tensor by tensor by llama.cpp's own `gguf` package."""

import shutil
from collections.abc import Iterator
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from align.errors import UserError
from align.export.gguf_vocab import add_vocabulary
from align.export.made import Made
from align.export.merging import finish, tie_if_equal
from align.export.modelfile import write_modelfile
from align.export.trained import source_of

FILE = "model.gguf"
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""transformers' model types that can be written, and llama.cpp's names of them."""
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""gguf's names of what weights are stored in; it has the others' in capitals."""
BY_LLAMA_CPP = ("q6_k", "q5_k_s", "q5_k_m", "q4_k_s", "q4_k_m")
"""What llama.cpp alone makes, out of a file in float32."""


def write(made: Made) -> None:
    """A GGUF file of the merged model, and an Ollama Modelfile where its chat template is of a known family."""
    trained, kind = made.trained, str(made.dtype)
    check_architecture(made.model.config)
    tie_if_equal(made.model, AutoConfig.from_pretrained(source_of(trained)))
    first = "float32" if kind in BY_LLAMA_CPP else kind
    path = made.folder / FILE
    write_gguf(made.model, made, path, first)
    if kind in BY_LLAMA_CPP:
        _quantise(path, kind)
    write_modelfile(made)


def check_architecture(config: Any) -> None:
    """Refuse what this converter does not know.

    Raises:
        UserError: another architecture, or a kind of positions.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--to gguf: {kind} is none of {', '.join(ARCHITECTURES)}; export it --to transformers and convert that by "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    rope = (_rope(config).get("rope_type") or "default").lower()
    if rope not in ("default", "llama3", "linear"):
        raise UserError(f"--to gguf: {rope} positions are not written; take llama.cpp's convert_hf_to_gguf.py")


def write_gguf(model: Any, made: Made, path: Path, kind: str) -> None:
    """One file, of which one tensor at a time is in memory beside the model."""
    import gguf

    config, name = model.config, ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(made.name)
    writer.add_file_type(gguf.LlamaFileType[_file_type(kind)])
    _add_sizes(writer, config)
    files = path.with_name(".tokenizer")
    finish(Made(made.trained, made.tokenizer, files, made.name, None, model))
    embeddings: Any = model.get_input_embeddings().weight
    add_vocabulary(writer, made.tokenizer, files, size=len(embeddings))
    shutil.rmtree(files)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.num_hidden_layers)
    kinds = {own: _type_of(own, tensor, kind) for own, tensor in _tensors(model, names)}
    for own, tensor in _tensors(model, names):
        block, size = gguf.GGML_QUANT_SIZES[kinds[own]]
        writer.add_tensor_info(
            own, tuple(tensor.shape), np.dtype(np.float32), tensor.numel() // block * size, raw_dtype=kinds[own]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for own, tensor in _tensors(model, names):
        writer.write_tensor_data(_stored(tensor, kinds[own]))
    writer.close()


def _stored(tensor: Tensor, kind: Any) -> np.ndarray:
    import gguf

    values = np.ascontiguousarray(tensor.numpy())
    if kind == gguf.GGMLQuantizationType.F32:
        return values
    if kind == gguf.GGMLQuantizationType.F16:
        return values.astype(np.float16)
    return gguf.quants.quantize(values, kind)


def _type_of(name: str, tensor: Tensor, kind: str) -> Any:
    """What a tensor is stored in: norms and biases in float32, rows that blocks do not divide in float16."""
    import gguf

    wanted = gguf.GGMLQuantizationType[TYPES.get(kind, kind.upper())]
    if tensor.dim() < 2:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _tensors(model: Any, names: Any) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under llama.cpp's names, as it computes with them; one that is shared once."""
    config = model.config
    frequencies = _frequency_factors(config)
    if frequencies is not None:
        yield "rope_freqs.weight", frequencies
    for name, tensor in model.named_parameters():  # of what is shared the first name alone
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None or (name == "lm_head.weight" and config.model_type.startswith("gemma")):
            raise UserError(f"--to gguf: llama.cpp has no place for {name} in a {config.model_type}")
        yield own, as_llama_cpp(name, tensor.detach().float(), config)


def as_llama_cpp(name: str, tensor: Tensor, config: Any) -> Tensor:
    """A weight as llama.cpp computes with it: rows of rotated queries and keys interleaved, Gemma's norms whole."""
    if ARCHITECTURES[config.model_type] == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def _add_sizes(writer: Any, config: Any) -> None:
    """The numbers of a model's config, by llama.cpp's names."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_freq_base(rope.get("rope_theta") or 10000.0)
    if (rope.get("rope_type") or "").lower() == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)


def _rope(config: Any) -> dict[str, Any]:
    """How positions turn: of layers that see everything, where layers differ."""
    found = config.rope_parameters or {}
    return found.get("full_attention", found)


def _frequency_factors(config: Any) -> Tensor | None:
    """What Llama 3's long positions divide every frequency by; None for other positions.

    Source: llama.cpp, conversion/llama.py; transformers, modeling_rope_utils.py.
    """
    rope = _rope(config)
    if (rope.get("rope_type") or "").lower() != "llama3":
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lengths = 2 * pi * rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    low, high, trained = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = ((trained / lengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def _file_type(kind: str) -> str:
    name = TYPES.get(kind, kind.upper())
    return "ALL_F32" if name == "F32" else f"MOSTLY_{name}"


def _quantise(path: Path, kind: str) -> None:
    """Turn a float32 file into one of llama.cpp's mixtures of types."""
    try:
        import llama_cpp
    except ImportError:
        raise UserError(f"--dtype {kind}: llama.cpp alone makes it; pip install llama-cpp-python") from None
    import gguf

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    made = path.with_suffix(".quantised")
    if llama_cpp.llama_model_quantize(str(path).encode(), str(made).encode(), options):
        raise UserError(f"--dtype {kind}: llama.cpp cannot quantise this model so; take q8_0")
    made.replace(path)
