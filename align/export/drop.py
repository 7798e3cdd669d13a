"""An adapter of which most entries are dropped and the others scaled up, as delta pruning does."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.export.trained import ADAPTER_FILE, Trained
from align.files import read_json, write_json
from align.model.adapters import DIFFERENCES


def drop_entries(trained: Trained, folder: Path, *, share: float, seed: int) -> Trained:
    """A copy of a LoRA with a random `share` of the entries of every B set to 0 and the others divided by 1 - share.

    The update s B A keeps its mean over the draws, as DARE's does; that draws from the entries of the whole update,
    whose product form an adapter would lose.

    Args:
        folder: where the copy is put.
        share: of entries, between 0 and 1.

    Raises:
        UserError: there is no LoRA, or two that are near each other, whose difference would be lost.

    Source: arXiv:2311.03099, arXiv:2410.09344 (with q = 1 - share, no search for another factor).
    """
    file = trained.folder / ADAPTER_FILE
    if trained.base is None or read_json(trained.folder / "adapter_config.json").get("peft_type") != "LORA":
        raise UserError(f"--drop: {trained.folder} holds no LoRA, and what is dropped are entries of a LoRA's factors")
    if (name := _adapter(trained)) in DIFFERENCES:
        raise UserError(
            f"--drop: {trained.folder} is {name}'s difference of two LoRAs: with entries dropped, parts of the base "
            "would be left; train a lora"
        )
    draw = torch.Generator().manual_seed(seed)
    tensors = load_file(file)
    for name in sorted(tensors):
        if "lora_B" in name or "lora_embedding_B" in name:
            kept = torch.rand(tensors[name].shape, generator=draw) >= share
            tensors[name] = (tensors[name] * kept / (1 - share)).to(tensors[name].dtype)
    folder.mkdir()
    with safe_open(file, "pt") as stored:
        save_file(tensors, folder / ADAPTER_FILE, metadata=stored.metadata() or {"format": "pt"})
    write_json(folder / "adapter_config.json", read_json(trained.folder / "adapter_config.json"))
    return replace(trained, folder=folder)


def _adapter(trained: Trained) -> str:
    """What the run's recipe calls it; nothing where there is no run."""
    policy = trained.run["recipe"].get("policy") or {}
    return str((policy.get("adapter") or {}).get("name", ""))
