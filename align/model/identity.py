"""What a model is, in a few short strings: the keys of caches and checkpoints."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from align.model.attach import adapter_tensors
from align.model.forward import base_model
from align.model.sharding import whole
from rewards.files import weights_digest

Identity = dict[str, str | None]

BACKEND = "linear_logprobs 1"
"""To be counted up when our own computation of log-probabilities changes its results."""


def base_identity(model: str, folder: Path) -> Identity:
    """A hub model's name and commit, or the digest of a local folder's weights and config."""
    if not Path(model).expanduser().is_dir():
        return {"base": model, "commit": folder.name}
    return {"base": weights_digest(folder), "commit": None}


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = whole(tensors[name].detach()).contiguous().cpu()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def reference_identity(model: PreTrainedModel | PeftModel, base: Identity, adapter: str | None) -> Identity:
    """All that a reference's log-probabilities depend on besides token ids and precision.

    Args:
        base: where the base weights came from.
        adapter: name of the adapter that the reference has; None for the base alone.
    """
    inner: Any = base_model(model)
    tensors = adapter_tensors(model, adapter) if adapter and isinstance(model, PeftModel) else {}
    return {
        **base,
        "adapter": tensors_digest(tensors) if tensors else None,
        "dtype": str(inner.dtype),
        "attention": inner.config._attn_implementation,
        "device": inner.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "backend": BACKEND,
    }


def short_digest(identity: Mapping[str, str | None]) -> str:
    """A folder name for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
