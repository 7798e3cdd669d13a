"""Digests of files and model folders, and whether an adapter was made for the weights that a folder holds now."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

BASE_KEY = "base"
"""In the metadata of an adapter's file: `{base, commit}` of the model that it was trained on, as JSON."""


def weights_digest(folder: Path) -> str:
    """sha256 of a model folder's weights and config."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(file_digest(file).encode())
    return digest.hexdigest()


def base_of(adapter: Path) -> dict[str, str | None]:
    """What an adapter's file says of its base: `base` and, of a hub model, `commit`; {} where it says nothing."""
    try:
        with safe_open(adapter, "pt") as tensors:
            return json.loads((tensors.metadata() or {}).get(BASE_KEY, "{}"))
    except SafetensorError:  # which loading it reports
        return {}


def is_of_other_weights(adapter: Path, folder: Path) -> bool:
    """Whether an adapter's file says that it was trained on a local model whose weights are not those of a folder.

    A model of the hub is known by its commit, so it is not compared with a folder's files.
    """
    stored = base_of(adapter)
    if not stored or stored["commit"] is not None or folder.parent.name == "snapshots":
        return False
    return stored["base"] != weights_digest(folder)


def file_digest(file: Path) -> str:
    """sha256 of a file; computed once per process while path, size and time of change stay."""
    stat = file.stat()
    return _file_digest(str(file.resolve()), stat.st_mtime_ns, stat.st_size)


@lru_cache
def _file_digest(path: str, mtime_ns: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
