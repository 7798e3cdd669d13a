"""What a scorer's rewards depend on, as one short string: the key of cached rewards."""

import hashlib
import importlib.util
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from align.section import Strict
from rewards.anchors import read_anchors
from rewards.config import Asking
from rewards.files import file_digest
from rewards.loading import chat_template_of, default_device, folder_of
from rewards.templates import VOLATILE
from rewards.types import Running

BACKEND = 2
"""To be counted up when our own computation of rewards changes its results."""
SPEED = {"tokens_per_batch", "texts_per_request", "requests_at_once", "timeout", "api_key"}
"""Fields that change how fast rewards come, not what they are."""
MODELS = ("model", "adapter", "reference", "reference_adapter", "strong", "weak")
"""Fields that name a model's folder or hub name."""


def scorer_digest(config: Strict) -> str:
    """sha256 over a configuration, the contents of the models it names and, where it has one, the library versions.

    A local folder counts by its files, a hub name by its commit, a Python function by its module's source, anchors by
    what they are. A served model counts by address and name alone.

    Raises:
        ScorerError: a model or a file that it names is not there.
    """
    fields: dict[str, Any] = {name: value for name, value in config.model_dump().items() if name not in SPEED}
    if isinstance(config, Running):
        for name in MODELS:
            if fields.get(name):
                fields[name] = _folder_digest(folder_of(fields[name], fields.get("revision")))
        if any(VOLATILE.search(template or "") for template in templates_of(config)):
            fields["day"] = str(date.today())  # the template may write it
        fields["device"] = torch.device(config.device or default_device()).type
        fields["versions"] = [torch.__version__, transformers.__version__, BACKEND]
    if fields.get("anchors"):
        fields["anchors"] = read_anchors(fields["anchors"])
    if "function" in fields:
        fields["source"] = _module_digest(fields["function"].split(":")[0])
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def templates_of(config: Strict) -> list[str | None]:
    """The chat template of each model that a configuration names; [] for a scorer without models.

    Raises:
        ScorerError: a model that it names is not there.
    """
    if not isinstance(config, Running):
        return []
    places = {name: getattr(config, name, None) for name in ("model", "reference", "strong", "weak")}
    return [chat_template_of(folder_of(own, getattr(config, "revision", None))) for own in places.values() if own]


def reads_text_without_template(config: Strict) -> bool:
    """Whether a scorer's model is one for chats and reads plain text as it stands; a judge writes its own messages."""
    return not isinstance(config, Asking) and any(template is not None for template in templates_of(config))


def _folder_digest(folder: Path) -> str:
    if folder.parent.name == "snapshots":  # of the hub's cache: the folder's name is the commit
        return f"{folder.parent.parent.name} {folder.name}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            digest.update(f"{file.name} {file_digest(file)};".encode())
    return digest.hexdigest()


def _module_digest(module: str) -> str:
    if "" not in sys.path:
        sys.path.append("")
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # of the package it is in; making the scorer says so
        return ""
    if spec is None or not spec.has_location or spec.origin is None:
        return ""
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
