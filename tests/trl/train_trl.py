"""Trains with TRL's trainers and with ours in the processes that a launcher has started, one setting after another.

`train_trl MODEL FOLDER` writes each one's log to FOLDER/PACKAGE-SETTING.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from same_script import pairs, trainer

from align.training.processes import leave

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
BATCH = 3
MICRO_BATCHES = 8
"""Of an epoch over all processes: two processes end their accumulation together."""
SETTINGS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "DPO": ("DPO", True, {"gradient_accumulation_steps": 2}),
    "DPO in full": ("DPO", False, {"learning_rate": 1e-3, "sync_ref_model": True, "ref_model_sync_steps": 2}),
    "Reward": ("Reward", True, {"gradient_accumulation_steps": 2}),
    "KTO": ("KTO", True, {"gradient_accumulation_steps": 2}),
}
"""Trainer, whether LoRA, and settings for two processes."""


def rows(name: str) -> Dataset:
    """Pairs, or each of their completions with a label, in as many micro-batches as an epoch has."""
    made = pairs(BATCH * MICRO_BATCHES, seed=4, longest=14)
    if name != "KTO":
        return made
    marked = [
        {"prompt": row["prompt"], "completion": row["chosen" if place % 2 else "rejected"], "label": bool(place % 2)}
        for place, row in enumerate(made)
    ]
    return Dataset.from_list(marked)


def logged(package: str, setting: str, model: str, folder: Path, processes: int) -> list[dict[str, Any]]:
    """The log of two epochs whose steps have the same rows in any number of processes."""
    name, adapter, options = SETTINGS[setting]
    per_process = options.get("gradient_accumulation_steps", 1) * 2 // processes
    own = {"per_device_train_batch_size": BATCH, "max_steps": -1, "num_train_epochs": 2, "max_length": 24}
    options = own | options | {"gradient_accumulation_steps": per_process}
    more = {"peft_config": LoraConfig(**LORA)} if adapter else {}
    if name == "Reward" and adapter:
        more["peft_config"].task_type = "SEQ_CLS"
    one = trainer(package, name, folder, model, options, train_dataset=rows(name), **more)
    one.train()
    return one.state.log_history


if __name__ == "__main__":
    model, folder = sys.argv[1], Path(sys.argv[2])
    state = PartialState(cpu=True)
    for setting in SETTINGS:
        for package in ("trl", "align.trl"):
            log = logged(package, setting, model, folder, state.num_processes)
            if state.is_main_process:
                (folder / f"{package}-{setting}.json").write_text(json.dumps(log))
    leave()
