"""Peak memory of full training on weights that FSDP2 cuts over two processes, against one process that holds all.

A random Llama of 71 million parameters, two short lists a step, so that weights, gradients and optimizer are what
counts. Memory is what a process has for itself (RssAnon of Linux, looked at every 5 ms over the whole run, loading and
checkpoints included) beyond what the same run of a model of a hundred thousand parameters has: the library's own.

Run it in the project's root, on a CPU.
"""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align.bench.measure import machine
from align.recipe import dump_recipe, parse_recipe

SIZES: dict[str, dict[str, Any]] = {
    "large": {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16},
    "small": {"vocab_size": 4096, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
}
STATES = 4
"""Of a parameter, float32 each: its weight, its gradient, and AdamW's two moments."""
TOKENIZER = Path("data/story-policy")
LOOKS = 0.005


def run() -> dict[str, Any]:
    """Both models in one process and in two."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        counts = {name: _write_model(place / name, sizes) for name, sizes in SIZES.items()}
        peaks = {(n, p): _peak(place, n, processes=p) for n in SIZES for p in (1, 2)}
    own = {p: [a - b for a, b in zip(peaks["large", p], peaks["small", p], strict=True)] for p in (1, 2)}
    once = _gathered_bytes()
    states = STATES * 4 * counts["large"]
    fall, promised = own[1][0] - max(own[2]), states / 2 - once
    result = {
        "machine": machine(torch.device("cpu")),
        "parameters": counts["large"],
        "states_bytes": states,
        "gathered_bytes": once,
        "peak_bytes": {str(p): values for p, values in own.items()},
        "library_bytes": {str(p): peaks["small", p] for p in (1, 2)},
        "fall_bytes": fall,
        "promised_fall_bytes": promised,
        "fall_of_promised": fall / promised,
    }
    _show(result)
    return result


def _write_model(folder: Path, sizes: dict[str, Any]) -> int:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _gathered_bytes() -> int:
    """What is whole at the end of a backward pass: embedding and head, each with its gradient."""
    sizes = SIZES["large"]
    return 2 * 2 * 4 * sizes["vocab_size"] * sizes["hidden_size"]


def _peak(place: Path, name: str, *, processes: int) -> list[int]:
    """The most memory that each process of a run has for itself."""
    rows = place / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "once {i}", "chosen": " upon a time", "rejected": " there {i}"}}\n' for i in range(8))
    )
    recipe = place / f"{name}_{processes}.yaml"
    tree = {
        "output": str(place / f"run_{name}_{processes}"),
        "policy": {"model": str(place / name), "adapter": {"name": "full"}},
        "reference": {"cache_dir": str(place / f"cache_{name}_{processes}")},
        "data": {"sources": [str(rows)], "eval_fraction": 0.0},
        "objective": {"name": "logistic"},
        "train": {"lists_per_step": 4, "steps": 4, "save_steps": 2, "threads": 1, "gradient_checkpointing": False},
        "sampling": {"prompts": 0, "token_lists": 0},
    }
    recipe.write_text(dump_recipe(parse_recipe(tree, origin="bench")))
    command = [sys.executable, "-m", "align.cli", "train", str(recipe)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        launch = ["--config_file", "recipes/accelerate/fsdp2.yaml", "--num_processes", str(processes)]
        command[2:3] = ["accelerate.commands.launch", *launch, "--main_process_port", port, "-m", "align.cli"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with (place / "log").open("w") as log:
        peaks = _watch(subprocess.Popen(command, env=environment, stdout=log, stderr=log), processes)
    if not peaks:
        raise RuntimeError((place / "log").read_text()[-4000:])
    return peaks


def _watch(started: subprocess.Popen, processes: int) -> list[int]:
    peaks: dict[int, int] = {}
    while started.poll() is None:
        ranks = _ranks(psutil.Process(started.pid), processes) if len(peaks) < processes else list(peaks)
        for pid in ranks:
            peaks[pid] = max(peaks.get(pid, 0), _own_bytes(pid))
        time.sleep(LOOKS)
    return sorted(peaks.values()) if started.returncode == 0 else []


def _ranks(process: psutil.Process, processes: int) -> list[int]:
    """The processes that train."""
    if processes == 1:
        return [process.pid]
    try:
        return [child.pid for child in process.children() if "align.cli" in child.cmdline()]
    except psutil.Error:  # one that has ended meanwhile
        return []


def _own_bytes(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) * 1024 if found else 0


def _show(result: dict[str, Any]) -> None:
    table = Table(
        "", "MB", title=f"full training of {result['parameters'] / 1e6:.0f} M parameters, memory of a process"
    )
    table.add_row("one process", f"{result['peak_bytes']['1'][0] / 1e6:.0f}")
    table.add_row("two, FSDP2, the larger", f"{max(result['peak_bytes']['2']) / 1e6:.0f}")
    table.add_row("the fall", f"{result['fall_bytes'] / 1e6:.0f}")
    table.add_row("half of all states, less what is gathered", f"{result['promised_fall_bytes'] / 1e6:.0f}")
    Console().print(table)
