"""What there is to export: a run's adapter or whole model, its base, tokenizer and what the run says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig, PreTrainedTokenizerBase

from align.bounds import check_folder
from align.errors import UserError
from align.files import read_json, read_object
from align.model.classifier import is_classifier, output_names
from align.model.load import load_tokenizer, loading, model_folder, model_name, read_tokenizer
from align.runs.digests import check_written
from align.runs.run_directory import RunDirectory
from rewards.files import base_of

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Trained:
    """What a run left, or a folder in the same layout."""

    folder: Path
    """Holds a PEFT adapter or a whole model."""
    base: str | None
    """Folder or hub name of the model that the adapter is for; None for a whole model."""
    revision: str | None
    trust_remote_code: bool
    outputs: list[str]
    """Names of a reward model's outputs; none for a language model."""
    run: dict[str, Any]
    """`recipe`, `summary` and `environment` of the run, as far as they exist."""
    run_folder: Path | None = None
    """The run directory, where it is one."""


def find_trained(path: Path, *, trust_remote_code: bool = False) -> Trained:
    """What there is to export in a run directory, or in a folder with an adapter or a whole model.

    Args:
        trust_remote_code: whether this call consents to the code that a model comes with.

    Raises:
        UserError: The path does not exist, or nothing trained is in it yet.

    Source: ours
    """
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a run directory or an adapter's folder")
    is_run = (path / "recipe.yaml").is_file()
    folder = path / "adapter" if is_run else path
    recipe = RunDirectory(path).recipe_tree() if is_run else {}
    if is_run:
        RunDirectory(path).check("adapter", "summary.json", "environment.json")
    check_written(path)
    policy = recipe.get("policy") or {}
    if not isinstance(policy, dict):
        raise UserError(f"{path / 'recipe.yaml'}: damaged, `policy` is no section; restore the file")
    check_folder(folder)
    run = {
        "recipe": recipe,
        "summary": _read_json(path / "summary.json"),
        "environment": _read_json(path / "environment.json"),
    }
    if policy.get("trust_remote_code") and not trust_remote_code:
        raise UserError(
            f"{path / 'recipe.yaml'}: the run ran the code that {policy.get('model')} comes with, and a file is no "
            "consent; read that code, then give --trust-remote-code"
        )
    remote = trust_remote_code
    outputs = _reward_outputs(folder, remote)
    if (folder / "adapter_config.json").is_file():
        read_json(folder / "adapter_config.json")  # PEFT would not say which file is damaged
        weights = folder / ADAPTER_FILE
        if not weights.is_file():
            raise UserError(
                f"{folder} holds no {ADAPTER_FILE}; an adapter in a pickle (adapter_model.bin) is not read, since "
                "reading it can run code: convert it once, where you trust it, with PEFT's save_pretrained"
            )
        with loading(folder, "has an adapter's config that cannot be read"):
            config = PeftConfig.from_pretrained(str(folder))
        commit = base_of(weights).get("commit")
        revision = commit or policy.get("revision", config.revision)
        base = config.base_model_name_or_path
        if base and Path(base).expanduser().is_dir():
            revision = None
        return Trained(folder, base and model_name(base), revision, remote, outputs, run, path if is_run else None)
    if (folder / "config.json").is_file():
        return Trained(folder, None, None, remote, outputs, run, path if is_run else None)
    if is_run:
        raise UserError(f"{path} has no adapter yet; run `align train {path / 'recipe.yaml'}` to its end")
    raise UserError(f"{path} is neither a run directory (no recipe.yaml) nor an adapter (no adapter_config.json)")


def _reward_outputs(folder: Path, trust_remote_code: bool) -> list[str]:
    if not (folder / "config.json").is_file():
        return []
    with loading(folder, "has a config that cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return output_names(config) if is_classifier(config) else []


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def read_tokenizer_of(trained: Trained) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter, which has the chat template it was trained with; otherwise the base's."""
    if trained.base is not None and not (trained.folder / "tokenizer_config.json").is_file():
        return load_tokenizer(trained.base, revision=trained.revision, trust_remote_code=trained.trust_remote_code)
    return read_tokenizer(trained.folder, trust_remote_code=trained.trust_remote_code)


def source_of(trained: Trained) -> Path:
    """The folder that the model's own files are in."""
    if trained.base is None:
        return trained.folder
    return model_folder(trained.base, trained.revision, trust_remote_code=trained.trust_remote_code)
