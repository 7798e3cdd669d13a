"""A script for TRL's DPOTrainer before and after the change of its import: time and memory of a step, equal losses.

Each side is a process of its own, and they take their steps in turn, so that whatever else runs disturbs both alike.
Recomputation is as the script has it: TRL's default, and off. TRL 1.16 has no padding-free rows to switch on, and
Liger's kernels no CPU. TRL's head scores completion positions only, as it does on a GPU, unless a case says otherwise:
on a CPU a user's script has every position scored.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.bench.measure import machine
from align.bench.step.shapes import PAIRS, SHAPES, pairs_of, random_lists, save

ROUNDS = 3
"""Steps that count, after one that warms up."""
PACKAGES = ("trl", "align.trl")
SMALL, WIDE, DEEP = SHAPES
EXACT = {"bf16": False}
CASES: list[dict[str, Any]] = [
    *(
        {"shape": SMALL, "adapter": adapter, "precomputed": precomputed, "recomputes": recomputes}
        for adapter in ("lora", "full")
        for precomputed in (True, False)
        for recomputes in (True, False)
    ),
    {"shape": SMALL, "adapter": "lora", "precomputed": False, "recomputes": True, "as_on_a_cpu": True},
    {"shape": SMALL, "adapter": "lora", "precomputed": False, "recomputes": True, "bf16": True},
    *(
        {"shape": shape, "adapter": adapter, "precomputed": False, "recomputes": True}
        for shape in (WIDE, DEEP)
        for adapter in ("lora", "full")
    ),
    *({"shape": shape, "adapter": "lora", "precomputed": True, "recomputes": False} for shape in (WIDE, DEEP)),
]


def run() -> dict[str, object]:
    """Every case whose name has the words of `TRL_CASES`, by default all."""
    words = os.environ.get("TRL_CASES", "").split(",")
    found: dict[str, Any] = {}
    for case in CASES:
        name = title(case)
        if any(word in name for word in words):
            found[name] = measure(case)
            print(name, {k: round(v, 2) for k, v in found[name].items() if isinstance(v, float)}, flush=True)
    Console(width=140).print(table(found))
    import transformers
    import trl

    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    about = {"machine": machine(torch.device("cpu")) | versions, "date": str(date.today()), "rounds": ROUNDS}
    return about | {"load": os.getloadavg()[0], "cases": found}


def title(case: dict[str, Any]) -> str:
    """A case in words."""
    parts = [case["shape"], {"lora": "LoRA", "full": "full"}[case["adapter"]]]
    parts.append("reference beforehand" if case["precomputed"] else "reference in the step")
    parts.append("recomputing (the default)" if case["recomputes"] else "without recomputing")
    parts += ["bfloat16"] if case.get("bf16") else []
    return ", ".join([*parts, *(["TRL's head as it is on a CPU"] if case.get("as_on_a_cpu") else [])])


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Both sides of a case, in turn.

    Raises:
        RuntimeError: a side failed, or losses differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = prepare(case, Path(folder))
        sides = {package: Side(package, given | {"output": f"{folder}/{package}"}) for package in PACKAGES}
        rounds = [{package: side.step() for package, side in sides.items()} for _ in range(1 + ROUNDS)]
        for side in sides.values():
            side.close()
    apart = max(abs(r["trl"]["loss"] - r["align.trl"]["loss"]) for r in rounds)
    if not apart <= (0.05 if case.get("bf16") else 1e-4):
        raise RuntimeError(f"{title(case)}: losses differ by {apart:.2g}: {rounds}")
    result: dict[str, Any] = {package: summary([r[package] for r in rounds]) for package in PACKAGES}

    def ratio(of: Callable[[dict[str, float]], float]) -> float:
        return of(result["align.trl"]) / of(result["trl"])

    return result | {
        "times_as_fast": 1 / ratio(lambda r: r["cpu_ms"]),
        "times_as_fast_wall": 1 / ratio(lambda r: r["ms"]),
        "memory_of_the_process": ratio(lambda r: r["peak_bytes"]),
        "memory_of_the_step": ratio(lambda r: r["peak_bytes"] - r["resident_bytes"]),
        "loss_difference": apart,
    }


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians of time after the first step; the most memory of all."""
    counted = steps[1:]
    return {name: statistics.median(s[name] for s in counted) for name in ("ms", "cpu_ms", "resident_bytes")} | {
        "peak_bytes": max(s["peak_bytes"] for s in steps)
    }


def prepare(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A model, its tokenizer of numbered words, and pairs of text, as many as the steps take."""
    shape, batch = case["shape"], PAIRS[case["shape"]]
    save(folder / "model", shape)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, SHAPES[shape]["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "model")
    rows = [
        {name.removesuffix("_ids"): " ".join(f"w{n}" for n in ids) + " " for name, ids in pair.items()}
        for seed in range(1 + ROUNDS)
        for example in random_lists(shape, batch, seed)
        for pair in pairs_of(example)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"bf16": bool(case.get("bf16")), "gradient_checkpointing": case["recomputes"]}
    return {
        "model": str(folder / "model"),
        "rows": str(folder / "rows.jsonl"),
        "adapter": case["adapter"],
        "batch": batch,
        "steps": 1 + ROUNDS,
        "head_on_completions": not case.get("as_on_a_cpu"),
        "config": config | {"precompute_ref_log_probs": case["precomputed"]},
    }


class Side:
    """A script that waits for a line before each step."""

    def __init__(self, package: str, case: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "align.bench.trl_side", package, json.dumps(case)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_DATASETS_CACHE": f"{case['output']}-cache"}
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment
        )

    def step(self) -> dict[str, float]:
        """Let it take one.

        Raises:
            RuntimeError: it has ended, with the last of what it said.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.said.seek(0)
            raise RuntimeError(self.said.read().decode()[-3000:])
        return json.loads(answer)

    def close(self) -> None:
        """Wait for its end."""
        self.process.communicate()


def table(found: dict[str, Any]) -> Table:
    """For the terminal."""
    shown = Table("", "TRL s", "ours s", "times as fast", "TRL MiB", "ours MiB", "process", "of it the step", box=None)
    for name, own in found.items():
        theirs, ours = (own[package] for package in PACKAGES)
        seconds = [f"{side['cpu_ms'] / 1e3:.2f}" for side in (theirs, ours)]
        sizes = [f"{side['peak_bytes'] / 2**20:.0f}" for side in (theirs, ours)]
        shares = [f"{own[f'memory_of_the_{part}']:.2f}" for part in ("process", "step")]
        shown.add_row(name, *seconds, f"{own['times_as_fast']:.2f}", *sizes, *shares)
    return shown
