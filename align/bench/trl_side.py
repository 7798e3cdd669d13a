"""A script for TRL's DPOTrainer, a step at a time: `python -m align.bench.trl_side PACKAGE '{...}'`.

PACKAGE is what it imports DPOConfig and DPOTrainer from; nothing else differs. It waits for a line before every step
and answers with what the step took.
"""

import ctypes
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(package: str, case: dict[str, Any]) -> None:
    """The user's script.

    Args:
        case: `model`, a folder; `rows`, a file; `adapter`; `batch`, pairs a step; `config`, more of DPOConfig; `steps`.
    """
    torch.set_num_threads(1)
    if case["head_on_completions"] and package == "trl":
        module: Any = importlib.import_module("trl.trainer.utils")
        module._use_triton = lambda device: True
    module = importlib.import_module(package)
    args = module.DPOConfig(
        output_dir=case["output"],
        per_device_train_batch_size=case["batch"],
        max_length=None,
        max_steps=case["steps"],
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **case["config"],
    )
    steps = StepByStep()
    trainer = module.DPOTrainer(
        model=case["model"],
        args=args,
        train_dataset=Dataset.from_json(case["rows"]),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS) if case["adapter"] == "lora" else None,
        callbacks=[steps],
    )
    trainer.train()


class StepByStep(TrainerCallback):
    """Takes a step when it is told to, and says its seconds, its loss, and the memory at its start and its most."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """A model that is loaded and trains: what there is now is no step's."""
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.resident = status("VmRSS")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        sys.stdin.readline()
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wall, cpu = self.began
        self.done = {"ms": (time.perf_counter() - wall) * 1e3, "cpu_ms": (time.process_time() - cpu) * 1e3}
        self.done |= {"resident_bytes": self.resident, "peak_bytes": status("VmHWM")}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            print(json.dumps(self.done | {"loss": logs["loss"]}), file=sys.__stdout__, flush=True)


def status(field: str) -> int:
    """Bytes that Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):
        main(sys.argv[1], json.loads(sys.argv[2]))
