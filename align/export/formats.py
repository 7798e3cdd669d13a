"""What a policy can be exported as: each format is one row of a table, with what writes it and what reads it again."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from align.errors import UserError
from align.export.trained import Trained

FLOATS = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
"""Nats by which log-probabilities may differ on average, by the dtype that weights are rounded to."""
GGUF = FLOATS | {
    "q8_0": 0.05,
    "q6_k": 0.05,
    **dict.fromkeys(("q5_0", "q5_1", "q5_k_s", "q5_k_m"), 0.15),
    **dict.fromkeys(("q4_0", "q4_1", "q4_k_s", "q4_k_m"), 0.3),
}


@dataclass(frozen=True)
class Format:
    """One way to store a policy."""

    name: str
    what: str
    """In words, for the card and the terminal."""
    writes: str
    """module:function, called with a `Made`."""
    engine: str
    """module:class of what reads it again; called with the folder and the trained policy's `Trained`."""
    tolerance: dict[str, float]
    """By what weights are stored in: nats by which log-probabilities may differ on average."""
    of_adapter: bool = False
    """Whether it is the adapter alone, so that no base is merged."""
    default: str | None = None
    """What weights are stored in, where not as the policy was trained."""
    modules: tuple[str, ...] = ()
    """What must be importable."""
    extra: str = ""
    """The extra that has these."""
    rewards: bool = False
    """Whether reward models can be written so, too."""
    calibrates: bool = False
    """Whether it looks at what training rows do in the model."""

    @property
    def stored_in(self) -> tuple[str, ...]:
        """What weights may be stored in, as `--dtype` names it."""
        return tuple(self.tolerance)

    def function(self) -> Callable[[Any], None]:
        return _named(self.writes)

    def reader(self) -> Callable[..., Any]:
        return _named(self.engine)


FORMATS = {
    form.name: form
    for form in (
        Format(
            "peft",
            "an adapter in PEFT's format",
            "align.export.adapter_files:write",
            "align.export.engines:Peft",
            FLOATS,
            of_adapter=True,
            rewards=True,
        ),
        Format(
            "transformers",
            "a whole model for transformers and vLLM",
            "align.export.merging:write",
            "align.export.engines:Transformers",
            FLOATS,
            rewards=True,
        ),
        Format(
            "gguf",
            "a whole model for llama.cpp, Ollama and LM Studio",
            "align.export.gguf_model:write",
            "align.export.llama_cpp:Model",
            GGUF,
            modules=("gguf",),
            extra="gguf",
        ),
        Format(
            "lora-gguf",
            "an adapter for llama.cpp, beside its base as GGUF",
            "align.export.gguf_adapter:write",
            "align.export.llama_cpp:Adapter",
            {name: FLOATS[name] for name in ("float32", "float16")},
            of_adapter=True,
            default="float32",
            modules=("gguf", "llama_cpp"),
            extra="llama-cpp",
        ),
        Format(
            "nf4",
            "a whole model in bitsandbytes' 4-bit NormalFloat",
            "align.export.quantised:nf4",
            "align.export.engines:Transformers",
            {"nf4": 0.3},
            default="nf4",
            modules=("bitsandbytes",),
            extra="nf4",
        ),
        *(
            Format(
                name,
                f"a whole model in {what}, as compressed-tensors",
                f"align.export.quantised:{name}",
                "align.export.engines:Transformers",
                {name: tolerance},
                default=name,
                modules=("llmcompressor", "compressed_tensors"),
                extra="compress",
                calibrates=name != "fp8",
            )
            for name, what, tolerance in (
                ("fp8", "8-bit floats", 0.1),
                ("awq", "4 bits (AWQ)", 0.3),
                ("gptq", "4 bits (GPTQ)", 0.3),
            )
        ),
        Format(
            "onnx",
            "the forward pass as an ONNX graph",
            "align.export.onnx_graph:write",
            "align.export.onnx_graph:Graph",
            {"float32": FLOATS["float32"]},
            default="float32",
            modules=("onnx", "onnxscript", "onnxruntime"),
            extra="onnx",
        ),
    )
}


def check_format(form: Format, dtype: str | None) -> None:
    """Refuse, before a model is loaded, what cannot be written here.

    Raises:
        UserError: a library is missing, or the format stores no such weights.
    """
    if dtype is not None and dtype not in form.stored_in:
        raise UserError(f"--dtype {dtype}: {form.name} is stored in {', '.join(form.stored_in)}")
    missing = [name for name in form.modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to {form.name} needs {' and '.join(missing)}, which is not installed; "
            f"pip install 'align-lm[{form.extra}]'"
        )


def check_fits(form: Format, trained: Trained) -> None:
    """Refuse what a format cannot hold.

    Raises:
        UserError: a reward model, or no adapter where one is wanted.
    """
    if trained.outputs and not form.rewards:
        raise UserError(f"--to {form.name}: a reward model's head is no language model's; take --to transformers")
    if form.of_adapter and trained.base is None:
        raise UserError(f"--to {form.name}: {trained.folder} holds a whole model; take --to transformers")


def _named(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    return getattr(import_module(module), name)
