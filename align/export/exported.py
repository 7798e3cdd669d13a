"""What an export has written, for the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from safetensors import safe_open

from align.export.formats import Format
from align.export.model_card import COMMANDS, compared_in_words
from align.export.served import adapter_rank, not_servable, room_for

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What safetensors calls them."""
PLAIN = ("peft", "transformers")
"""Formats whose tensors say what they are stored in."""


def describe(folder: Path, *, form: Format, base: str | None, outputs: Sequence[str], found: dict[str, Any]) -> str:
    """Form and dtype, files with their sizes, what merging and rounding cost, and how to load it.

    Args:
        form: what was written.
        base: the model that an adapter is for; None where all weights were trained.
        outputs: names of a reward model's outputs; none for a language model.
        found: what `export.json` says.
    """
    kind = "reward model" if outputs else "model"
    what = f"an adapter for {base}" if form.of_adapter else f"a whole {kind}"
    weights = sorted(folder.glob("*.safetensors"))
    others = sorted(file for file in folder.iterdir() if file not in weights)
    lines = [f"{folder}: {what} in {' and '.join(_dtypes(weights)) if form.name in PLAIN else found['dtype']}"]
    sizes = (f"{file.name} {decimal(file.stat().st_size, precision=2)}" for file in [*weights, *others])
    lines.append("  " + ", ".join(sizes))
    lines += [f"  {said}" for said in compared_in_words(found, is_reward=bool(outputs))]
    return "\n".join([*lines, *(f"  load: {line}" for line in _loading(folder, form, base, outputs))])


def _loading(folder: Path, form: Format, base: str | None, outputs: Sequence[str]) -> list[str]:
    if outputs:
        return [f"align score --reward {folder} INPUT OUTPUT"]
    if form.name in COMMANDS:
        return COMMANDS[form.name].format(name=folder, base=base).splitlines()
    if not form.of_adapter:
        return [f'transformers.AutoModelForCausalLM.from_pretrained("{folder}")', f"vllm serve {folder}"]
    lines = [f'peft.AutoPeftModelForCausalLM.from_pretrained("{folder}")']
    if not not_servable(folder):
        room = f"--max-lora-rank {room_for(adapter_rank(folder))}"
        lines.append(
            f"vllm serve {base} --tokenizer {folder} --enable-lora {room} --lora-modules {folder.name}={folder}"
        )
    return lines


def _dtypes(files: Sequence[Path]) -> list[str]:
    found = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return sorted(DTYPES.get(name, name) for name in found)
