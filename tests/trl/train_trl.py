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
LISTS = {"objective": "lambda", "data": {"grades": "raw"}, "tokens_per_batch": 60}
OF_LISTS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "lists": ("DPO", True, {"gradient_accumulation_steps": 2, "align": LISTS}),
    "lists in full": ("DPO", False, {"learning_rate": 1e-3, "align": LISTS}),
}
"""What TRL has nothing of: lists of two to four completions, in passes of which processes have different numbers."""


def rows(name: str) -> Dataset:
    """Pairs, or each of their completions with a label, in as many micro-batches as an epoch has."""
    made = pairs(BATCH * MICRO_BATCHES, seed=4, longest=14)
    if name == "lists":
        return Dataset.from_list([_list(row, place) for place, row in enumerate(made)])
    if name != "KTO":
        return made
    marked = [
        {"prompt": row["prompt"], "completion": row["chosen" if place % 2 else "rejected"], "label": bool(place % 2)}
        for place, row in enumerate(made)
    ]
    return Dataset.from_list(marked)


def _list(row: dict[str, str], place: int) -> dict[str, Any]:
    words = row["chosen"].split()
    texts = [row["chosen"], row["rejected"], " ".join(words[::-1]) + " w7", " ".join(words[:1]) + " w8"]
    return {
        "prompt": row["prompt"],
        "completions": texts[: 2 + place % 3],
        "grades": [3.0, 1.0, 2.0, 0.0][: 2 + place % 3],
    }


def logged(package: str, setting: str, model: str, folder: Path, processes: int) -> list[dict[str, Any]]:
    """The log of two epochs whose steps have the same rows in any number of processes."""
    name, adapter, options = (SETTINGS | OF_LISTS)[setting]
    per_process = options.get("gradient_accumulation_steps", 1) * 2 // processes
    own = {"per_device_train_batch_size": BATCH, "max_steps": -1, "num_train_epochs": 2, "max_length": 24}
    options = own | options | {"gradient_accumulation_steps": per_process}
    more = {"peft_config": LoraConfig(**LORA)} if adapter else {}
    if name == "Reward" and adapter:
        more["peft_config"].task_type = "SEQ_CLS"
    own_rows = rows("lists" if setting in OF_LISTS else name)
    one = trainer(package, name, folder, model, options, train_dataset=own_rows, **more)
    one.train()
    return one.state.log_history


if __name__ == "__main__":
    model, folder = sys.argv[1], Path(sys.argv[2])
    state = PartialState(cpu=True)
    for setting in (*SETTINGS, *OF_LISTS):
        for package in ("align.trl",) if setting in OF_LISTS else ("trl", "align.trl"):
            log = logged(package, setting, model, folder, state.num_processes)
            if state.is_main_process:
                (folder / f"{package}-{setting}.json").write_text(json.dumps(log))
    leave()
