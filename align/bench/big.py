"""Data larger than memory: `align inspect`, two starts of `align train`, and TRL's DPOTrainer beside them.

Run it in the project's root; `BIG_MB` sets the file's size (2000 by default), which is written below the folder for
temporary files and removed. Each start is a process of its own, measured from its first moment to the end of its first
optimizer step: seconds, seconds of the processor (which other programs disturb less), peak memory, and the part of it
that is no mapped file and that the system cannot take back. The second start finds the first one's cache: ours its
preparation, TRL's what `datasets` keeps. TRL holds no rows out and counts nothing.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from align.bench.measure import machine

POLICY = "data/story-policy"
WORDS = (
    *("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "once", "upon", "time", "there", "was"),
    *("little", "girl", "who", "loved", "to", "play", "and"),
)
LISTS, SIZE = 200_000, 8
"""Short lists, besides the file of pairs."""
WORDS_OF_AN_ANSWER = 400
EVERY = 0.05
"""Seconds between looks at a process's memory."""
TRL = """
import sys, datasets
from trl import DPOConfig, DPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train")
words = AutoTokenizer.from_pretrained(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
config = DPOConfig(output_dir=sys.argv[3], max_length=256, max_steps=1, per_device_train_batch_size=4, use_cpu=True,
    bf16=False, report_to="none", gradient_checkpointing=False, save_strategy="no")
DPOTrainer(model, args=config, train_dataset=rows, processing_class=words).train()
"""


def run() -> dict[str, Any]:
    """Pairs in a file of `BIG_MB` on both sides, and short lists on ours."""
    size = int(os.environ.get("BIG_MB", "2000")) * 10**6
    results: dict[str, Any] = {}
    for name, rows in (("pairs", pairs(size)), (f"lists of {SIZE}", lists(min(LISTS, size // 1500)))):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.jsonl")
            count = write(rows, file)
            results[name] = {"rows": count, "bytes": file.stat().st_size, "starts": measure(file, trl=name == "pairs")}
    Console(width=140).print(table(results))
    about = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0], "policy": POLICY, "max_length": 256}
    return {"machine": machine(torch.device("cpu")), **about, "cases": results}


def pairs(size: int) -> Iterator[dict[str, Any]]:
    """Pairs of long answers until they are so many bytes of JSON."""
    chance, written = random.Random(0), 0
    while written < size:
        answers = [" ".join(chance.choices(WORDS, k=WORDS_OF_AN_ANSWER)) for _ in range(2)]
        row = {"prompt": " ".join(chance.choices(WORDS, k=20)), "chosen": answers[0], "rejected": answers[1]}
        written += len(json.dumps(row)) + 1
        yield row


def lists(count: int) -> Iterator[dict[str, Any]]:
    """Lists of short answers with scores."""
    chance = random.Random(1)
    for _ in range(count):
        answers = [" ".join(chance.choices(WORDS, k=12)) for _ in range(SIZE)]
        scores = [round(chance.random(), 3) for _ in range(SIZE)]
        yield {"prompt": " ".join(chance.choices(WORDS, k=12)), "completions": answers, "scores": scores}


def write(rows: Iterator[dict[str, Any]], file: Path) -> int:
    """Write rows as they come; their number."""
    count = 0
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")
            count += 1
    return count


def measure(file: Path, *, trl: bool) -> dict[str, dict[str, float]]:
    """Every start, each with the cache that those before it have left."""
    folder = file.parent
    recipe = folder / "recipe.yaml"
    sections = {
        "objective": {"name": "logistic"},
        "policy": {"model": POLICY},
        "data": {"sources": [{"path": str(file)}], "max_length": 256, "eval_fraction": 0.00001},
        "reference": {"cache": False},
        "train": {"steps": 1, "lists_per_step": 4, "threads": 1},
        "sampling": {"prompts": 1, "max_tokens": 4},
    }
    recipe.write_text(json.dumps(sections), encoding="utf-8")

    def train(name: str) -> dict[str, float]:
        output = folder / name
        command = [sys.executable, "-m", "align.cli", "train", str(recipe), f"output={output}"]
        return start(command, folder / "ours", until=lambda: (output / "metrics.jsonl").exists())

    found = {"align train, first start": train("first"), "align train, second start": train("second")}
    inspect = [sys.executable, "-m", "align.cli", "inspect", str(recipe), f"output={folder / 'x'}"]
    found["align inspect, empty cache"] = start(inspect, folder / "other")
    if trl:
        for name in ("first", "second"):
            command = [sys.executable, "-c", TRL, str(file), POLICY, str(folder / "trl")]
            found[f"TRL's DPOTrainer, {name} start"] = start(command, folder / "theirs")
    return found


def start(command: Sequence[str], cache: Path, *, until: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Run a command to its end, or until something holds, and look at what it takes.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "140"}
    began, before = time.monotonic(), _processor()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        peak = own = 0
        while process.poll() is None and not until():
            now = _memory(process.pid)
            peak, own = max(peak, now.get("VmHWM", 0)), max(own, now.get("RssAnon", 0))
            time.sleep(EVERY)
        seconds, done = time.monotonic() - began, process.poll() is None
        process.terminate()
        process.wait()
        if not done and process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command}: {said.read().decode()[-4000:]}")
    return {"seconds": seconds, "cpu_seconds": _processor() - before, "peak_bytes": peak, "peak_own_bytes": own}


def _processor() -> float:
    """Seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(process: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in fields if "kB" in rest}


def table(results: dict[str, Any]) -> Table:
    """What was measured, for the terminal."""
    shown = Table("", "seconds", "processor s", "peak MiB", "of it own MiB", title="to the end of the first step")
    for case, result in results.items():
        shown.add_section()
        for name, f in result["starts"].items():
            sizes = (f"{f[key] / 2**20:.0f}" for key in ("peak_bytes", "peak_own_bytes"))
            label = f"{result['rows']} {case}, {result['bytes'] / 1e6:.0f} MB: {name}"
            shown.add_row(label, f"{f['seconds']:.0f}", f"{f['cpu_seconds']:.0f}", *sizes)
    return shown
