"""A trained policy as a folder that engines load: its adapter, or base and adapter merged with an explicit LM head."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.export.export import find_trained, write_files
from align.files import replaced_folder, write_json
from align.progress import stage
from align.rollout.engine import Weights
from rewards.files import file_digest

HEAD, INDEX = "lm_head.weight", "model.safetensors.index.json"
EMBEDDINGS = "embed_tokens.weight"

Kind = Literal["adapter", "merged"]
Shapes = dict[str, tuple[int, ...]]


@stage("writing weights for the engine")
def write_weights(
    trained: Path, output: Path, *, kind: Kind, version: int, dtype: str, trusted: bool = False
) -> Weights:
    """Make the folder that an engine loads, all of it or nothing; what is there already is used.

    Args:
        trained: a run directory, or a folder with an adapter in PEFT's format or a whole model.
        output: folder of such folders; the new one is named after version, kind and what was trained.
        kind: what the engine is to load; a whole model is always "merged".
        version: optimizer steps that made the policy.
        dtype: what merged weights are stored in.
        trusted: whether this call consents to code that the model comes with.

    Raises:
        UserError: the adapter does not fit its base, or merging would change the policy.
    """
    found = find_trained(trained, trust_remote_code=trusted)
    digest = hashlib.sha256("".join(file_digest(file) for file in sorted(found.folder.glob("*.safetensors"))).encode())
    name = f"{kind}-v{version}-{digest.hexdigest()[:12]}"
    folder = output / name
    if not folder.exists():
        with replaced_folder(folder) as partial:
            write_files(found, partial, merge=kind == "merged", dtype=dtype if kind == "merged" else None)
            if kind == "merged":
                add_head(partial)
    return Weights(kind, str(folder.resolve()), version, name)


def write_zeros(adapter: Path, folder: Path) -> Path:
    """An adapter of another one's form that changes nothing: what serves the base model beside adapters.

    A CPU engine gives base requests in one batch with an adapter's that adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in adapter.iterdir():
        if file.suffix == ".safetensors":
            zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
            save_file(zeros, folder / file.name, metadata={"format": "pt"})
        elif file.name == "adapter_config.json":
            shutil.copy(file, folder)
    return folder


def remove_older(weights: Weights) -> None:
    """Remove the other folders of the same place: every engine has loaded these."""
    present = Path(weights.folder)
    for folder in present.parent.iterdir():
        if str(folder) not in (weights.folder, weights.against):
            shutil.rmtree(folder)


def add_head(folder: Path) -> None:
    """Store the LM head of a tied model under its own name too.

    vLLM on a CPU packs the head when it loads a model and does not see later changes of the embeddings.
    """
    files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    if HEAD in files:
        return
    name = next((name for name in files if name.endswith(EMBEDDINGS)), None)
    if name is None:
        raise UserError(f"{folder}: no {HEAD} and no {EMBEDDINGS}; use `rollout.engine: transformers` for this model")
    tensors = load_file(files[name])
    tensors[HEAD] = tensors[name].clone()
    save_file(tensors, files[name], metadata={"format": "pt"})
    index = folder / INDEX
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"][HEAD] = files[name].name
        write_json(index, content)


def check_same_layout(folder: Path, base: Path) -> None:
    """Refuse weights that an engine started with `base` cannot take over: a failed reload leaves it without any.

    Raises:
        ValueError: names or shapes differ, or the LM head is not among them.
    """
    new, old = shapes(folder), shapes(base)
    if HEAD not in new:
        raise ValueError(f"{folder} has no {HEAD}; an engine on a CPU would go on with its old one")
    old.setdefault(HEAD, new[HEAD])
    odd = {name for name in new.keys() | old.keys() if new.get(name) != old.get(name)}
    if odd:
        raise ValueError(f"{folder} does not fit {base}: {len(odd)} weights differ in name or shape, first {min(odd)}")


def shapes(folder: Path) -> Shapes:
    """Shape of every tensor in a model's safetensors files, read from their heads."""
    found: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found


def is_tied(folder: Path) -> bool:
    """Whether a model's LM head is its embeddings."""
    config = json.loads((folder / "config.json").read_text())
    return bool(config.get("text_config", config).get("tie_word_embeddings", True))


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())
