"""What an export has written, for the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.filesize import decimal
from safetensors import safe_open

from align.export.model_card import fidelity

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What safetensors calls them."""


def describe(folder: Path, *, base: str | None, outputs: Sequence[str], differences: dict[str, float]) -> str:
    """Form and dtype, files with their sizes, what merging and rounding cost, and how to load it.

    Args:
        base: the model that an adapter is for; None for a whole model.
        outputs: names of a reward model's outputs; none for a language model.
        differences: as `export.write_files` gives them.
    """
    kind = "reward model" if outputs else "model"
    form = f"an adapter for {base}" if base else f"a whole {kind}"
    weights = sorted(folder.glob("*.safetensors"))
    others = sorted(file for file in folder.iterdir() if file not in weights)
    lines = [f"{folder}: {form} in {' and '.join(_dtypes(weights))}"]
    sizes = (f"{file.name} {decimal(file.stat().st_size, precision=2)}" for file in [*weights, *others])
    lines.append("  " + ", ".join(sizes))
    if differences:
        lines.append(f"  {fidelity(differences, is_reward=bool(outputs))}")
    return "\n".join([*lines, *(f"  load: {line}" for line in _loading(folder, base, outputs))])


def _loading(folder: Path, base: str | None, outputs: Sequence[str]) -> list[str]:
    if outputs:
        return [f"align score --reward {folder} INPUT OUTPUT"]
    if base is None:
        return [f'transformers.AutoModelForCausalLM.from_pretrained("{folder}")', f"vllm serve {folder}"]
    served = f"vllm serve {base} --enable-lora --lora-modules {folder.name}={folder}"
    return [f'peft.AutoPeftModelForCausalLM.from_pretrained("{folder}")', served]


def _dtypes(files: Sequence[Path]) -> list[str]:
    found = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return sorted(DTYPES.get(name, name) for name in found)
