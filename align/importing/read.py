"""A file -> whose it is and what it sets."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from align.bounds import load_yaml
from align.errors import UserError
from align.files import is_there
from align.importing import axolotl, llama_factory, swift, trl
from align.importing.losses import INSTEAD
from align.importing.script import read_script
from align.importing.shell import read_shell
from align.recipe.other_tools import TELLTALES

CONFIGS = {"TRL": trl, "LLaMA-Factory": llama_factory, "axolotl": axolotl, "ms-swift": swift}
"""Tools whose files are mappings -> their module."""
SURE = {
    "LLaMA-Factory": ("stage", "finetuning_type", "pref_beta"),
    "axolotl": ("base_model", "micro_batch_size"),
    "ms-swift": ("rlhf_type", "tuner_type", "train_type", "split_dataset_ratio"),
    "TRL": ("model_name_or_path", "dataset_name", "dataset_mixer", "dataset_mixture"),
}
"""Keys that one tool alone has, the first that fits wins."""
NEWER = ("dist_config", "kernel_config", "model_class", "peft_config", "train_dataset")
VERBS = {
    "reward": "reward",
    "dpo": "dpo",
    "kto": "kto",
    "sft": "sft",
    "grpo": "grpo",
    "rloo": "rloo",
    "cpo": "cpo",
    "orpo": "orpo",
}
OTHERS = (
    "give a configuration of LLaMA-Factory, axolotl, TRL or ms-swift, a shell script that runs one, or a Python script "
    "of TRL's trainers"
)


class Found(NamedTuple):
    """What a file sets, in the words of its tool."""

    tool: str
    method: str
    values: dict[str, Any]
    devices: int = 1
    notes: Mapping[str, str] = {}
    by_name: bool = False
    """Whether the method is told by the file's name alone."""


def read(file: Path, method: str | None) -> Found:
    """What a file sets.

    Args:
        method: dpo, kto, ..., for a configuration that does not say it.

    Raises:
        UserError: nobody's file, or one that trains by a method that is not here.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; {OTHERS}")
    try:
        found = _read(file, method)
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8; {OTHERS}") from None
    if found.method in INSTEAD:
        raise UserError(f"{file}: trains by `{found.method}`, which is not imported; {INSTEAD[found.method]}")
    return found


def _read(file: Path, method: str | None) -> Found:
    if file.suffix == ".py":
        script = read_script(file)
        return Found(script.tool, script.method, script.values, notes=script.notes)
    if file.suffix in (".sh", ".bash", ".txt", ""):
        return _of_shell(file, method)
    return _of_mapping(file, _mapping(file), method)


def _mapping(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    try:
        tree = json.loads(text) if file.suffix == ".json" else load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())}); {OTHERS}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: is no mapping of keys; {OTHERS}")
    return {str(key): value for key, value in tree.items()}


def _of_shell(file: Path, method: str | None) -> Found:
    called = read_shell(file)
    if called.tool == "Megatron-SWIFT":
        problem = "shards a model over devices by Megatron, whose arguments have no counterpart"
        raise UserError(f"{file}: `megatron {called.verb}` {problem}; give the `swift rlhf` command of the same model")
    values = called.values
    if called.file is not None:
        named = Path(called.file) if is_there(Path(called.file), Path.is_file) else file.parent / called.file
        if not is_there(named, Path.is_file):
            raise UserError(f"{file}: runs {called.file}, which is not there; give it as the file")
        values = {**_mapping(named), **values}
    if called.tool == "TRL":
        return Found("TRL", VERBS.get(called.verb, called.verb), values, called.devices)
    if called.tool == "ms-swift":
        verb = called.verb
        default = {"sft": "sft", "pt": "pt"}.get(verb, "dpo")
        return Found("ms-swift", _method(file, swift, str(values.get("rlhf_type", default))), values, called.devices)
    return _of_mapping(file, values, method)


def _of_mapping(file: Path, tree: dict[str, Any], method: str | None) -> Found:
    tool = tool_of(tree)
    if tool is None:
        if len(set(NEWER) & tree.keys()) > 2:
            problem = "is a file of LLaMA-Factory's second version, which has no stage for preferences in it"
            raise UserError(f"{file}: {problem}; give the file of its first, with `stage` and `template`")
        raise UserError(f"{file}: no tool's configuration that is known; {OTHERS}")
    if tool in ("TRL", "axolotl"):
        said = CONFIGS[tool].method_of(tree) or method
        if tool == "axolotl":
            return Found(tool, _method(file, axolotl, str(said)), tree)
        told = said or _by_name(file, tree)
        if told is None:
            remedy = f"add `--method` with one of {', '.join(trl.METHODS)}"
            raise UserError(f"{file}: does not say which of TRL's trainers reads it; {remedy}")
        return Found(tool, _method(file, trl, told), tree, by_name=said is None)
    module = CONFIGS[tool]
    default = "sft" if tool == "LLaMA-Factory" else "dpo"
    return Found(tool, _method(file, module, str(tree.get(module.METHOD, default))), tree)


def _method(file: Path, module: Any, name: str) -> str:
    if name not in module.METHODS and name not in INSTEAD:
        raise UserError(f"{file}: `{name}` is no method of {module.NAME} known here; {', '.join(module.METHODS)} are")
    return module.METHODS.get(name, name) if name not in INSTEAD else name


def _by_name(file: Path, tree: Mapping[str, Any]) -> str | None:
    """The method that the file's name or its folder's tells; preferences without more are DPO's."""
    words = f"{file.resolve().parent.name}/{file.name}".lower()
    named = next(
        (
            name
            for name in ("online_dpo", "orpo", "simpo", "cpo", "kto", "dpo", "reward", "sft", "grpo")
            if name in words
        ),
        None,
    )
    return named or ("dpo" if {"beta", "loss_type"} & tree.keys() else None)


def tool_of(tree: Mapping[str, Any]) -> str | None:
    """Whose configuration a mapping is."""
    for tool, keys in SURE.items():
        if any(key in tree for key in keys):
            return tool
    counts = {tool: len(TELLTALES[tool] & tree.keys()) for tool in CONFIGS}
    tool = max(counts, key=lambda name: counts[name])
    return tool if counts[tool] >= 3 and not {"dist_config", "model_class"} & tree.keys() else None
