"""The planner beside what runs take: peak memory and seconds of eight small runs, each in a process of its own.

Models of 24 to 105 million random parameters are made for it, so that weights and activations outweigh Python. Memory
is the peak of the resident set from before the model is read until the last step, less what it was before; seconds are
the processor's of the steps with one thread, beside the plan's at the rate of a measured step, as `--measure` finds it.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align.bench.measure import machine

TOKENIZER = "data/story-policy"
STEPS = 2
SIZES = {"24m": (512, 7), "50m": (768, 7), "100m": (1024, 8)}
"""Name -> width and layers."""
WIDE = {"prompt": (64, 128), "completion": (48, 96)}
LONG = {"prompt": (256, 384), "completion": (160, 320)}
CASES: dict[str, dict[str, Any]] = {
    "lora, pairs": {"size": "50m", "k": 2, **WIDE},
    "lora, pairs, checkpointing": {
        "size": "50m",
        "k": 2,
        **LONG,
        "keys": ["train.gradient_checkpointing=true"],
    },
    "lora, pairs, padded": {"size": "50m", "k": 2, **WIDE, "keys": ["train.packing=false"]},
    "lora, lists of 8": {"size": "24m", "k": 8, **WIDE},
    "lora, pairs, long": {"size": "50m", "k": 2, **LONG},
    "full, pairs": {"size": "24m", "k": 2, **WIDE, "keys": ["policy.adapter=full"]},
    "full, large": {
        "size": "100m",
        "k": 2,
        **WIDE,
        "keys": ["policy.adapter=full", "train.gradient_checkpointing=true", "train.tokens_per_batch=1024"],
    },
    "reward model, pairs": {"size": "50m", "k": 2, **WIDE, "keys": ["task=reward", "objective=bradley_terry"]},
}
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc gives freed blocks back at once, so that the resident set is what is in use."""
KEYS = (
    f"train.steps={STEPS}",
    "train.lists_per_step=4",
    "train.tokens_per_batch=2048",
    "train.gradient_checkpointing=false",
    "train.threads=1",
    "sampling.prompts=0",
    "sampling.token_lists=0",
    "data.eval_fraction=0.1",
    "data.max_length=1024",
)


def run() -> dict[str, Any]:
    """Planned and measured, case by case."""
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for name, case in CASES.items():
            found[name] = _case(Path(folder), name, case)
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    Console(width=120).print(_table(found))
    about = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0], "steps": STEPS}
    return {"machine": machine(torch.device("cpu")), **about, "cases": found}


def make_model(size: str, folder: Path) -> Path:
    """A Llama of random weights with the shipped tokenizer."""
    width, layers = SIZES[size]
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 128,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def make_rows(case: dict[str, Any], file: Path) -> Path:
    """Lists of random words, of lengths drawn evenly from the case's ranges."""
    draw = random.Random(0)
    words = ["the", "a", "dog", "cat", "ran", "to", "home", "and", "saw", "big", "red", "ball", "with", "her", "mom"]

    def text(span: tuple[int, int]) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(*span)))

    with file.open("w") as out:
        for number in range(24):
            completions = [text(case["completion"]) for _ in range(case["k"])]
            grades = [float(k) for k in range(case["k"])]
            row = {"id": str(number), "prompt": text(case["prompt"]), "completions": completions, "grades": grades}
            out.write(json.dumps(row) + "\n")
    return file


def _case(folder: Path, name: str, case: dict[str, Any]) -> dict[str, Any]:
    model = make_model(case["size"], folder / case["size"])
    rows = make_rows(case, folder / "rows.jsonl")
    place = folder / name.replace(" ", "_").replace(",", "")
    keys = [f"policy.model={model}", f"data.sources={rows}", f"output={place}", *KEYS, *case.get("keys", [])]
    keys += [f"data.select={'all' if case['k'] > 2 else 'best_worst'}", f"reference.cache_dir={folder / 'cache'}"]
    planned = _child("planned", keys)
    measured = _child("measured", keys)
    seconds = 3600 * planned["hours"]
    return {
        "planned_bytes": planned["bytes"],
        "measured_bytes": measured["bytes"],
        "memory_ratio": planned["bytes"] / measured["bytes"],
        "planned_seconds": seconds,
        "measured_seconds": measured["seconds"],
        "time_ratio": seconds / measured["seconds"],
        "parts": planned["parts"],
        "plan_seconds": planned["seconds"],
    }


def _child(what: str, keys: list[str]) -> dict[str, Any]:
    """Either side in a process of its own: what one leaves in memory is not the other's."""
    command = [sys.executable, "-m", "align.bench.plan_side", what, *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ALLOCATOR)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def _table(found: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("run", "planned MB", "measured MB", "ratio", "planned s", "measured s", "ratio"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, own in found.items():
        sizes = [f"{own[f'{side}_bytes'] / 1e6:.0f}" for side in ("planned", "measured")]
        times = [f"{own[f'{side}_seconds']:.1f}" for side in ("planned", "measured")]
        table.add_row(name, *sizes, f"{own['memory_ratio']:.2f}", *times, f"{own['time_ratio']:.2f}")
    return table
