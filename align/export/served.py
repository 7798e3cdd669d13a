"""Which adapters vLLM serves beside their base."""

import json
from pathlib import Path

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for."""


def room_for(rank: int) -> int:
    """The least room that vLLM reserves for an adapter of a rank, at most its largest."""
    return next((room for room in RANKS if room >= rank), RANKS[-1])


def adapter_rank(folder: Path) -> int:
    """Largest rank of an adapter; 0 for a whole model."""
    if not (folder / "adapter_config.json").is_file():
        return 0
    config = json.loads((folder / "adapter_config.json").read_text())
    pattern = (config.get("rank_pattern") or {}).values()  # of AdaLoRA which of its directions are kept
    return max([config.get("r") or 0, *(sum(own) if isinstance(own, list) else own for own in pattern)])


def not_servable(folder: Path) -> str:
    """Why vLLM cannot serve what was trained as an adapter; empty where it can."""
    if not (folder / "adapter_config.json").is_file():
        return "it is a whole model"
    config = json.loads((folder / "adapter_config.json").read_text())
    reasons = {
        f"its type is {config['peft_type']}": config["peft_type"] != "LORA",
        "it is a DoRA": config.get("use_dora"),
        "it trains biases": config.get("bias", "none") != "none",
        "it has modules of its own": config.get("modules_to_save"),
        f"its rank is above {RANKS[-1]}": adapter_rank(folder) > RANKS[-1],
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
