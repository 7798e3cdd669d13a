"""50,000 rows scored by one process, by two actors of a Ray cluster, and again with one killed; run it in the root.

`RAY_ROWS` makes them fewer.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from align.bench.measure import machine
from align.data import stream_rows

ROWS, CHARACTERS = int(os.environ.get("RAY_ROWS", "50000")), 60
"""Rows of one completion each, which is so long at most: what is measured is rows, not the model."""
SCORER = "data/story-scorer"
LISTS = "data/story-lists/train.jsonl.gz"
STARTED = re.compile(r"actor (\w+) runs in process (\d+)")
KILL_AT = 0.4
"""Share of the windows that are done when an actor is killed."""
WINDOW = 1024 if ROWS >= 50_000 else 256
ON_RAY = ["--ray", "--actors", "2"]
WAYS: dict[str, tuple[list[str], bool]] = {
    "one process": ([], False),
    "two actors": (ON_RAY, False),
    "two actors, one killed": (ON_RAY, True),
}
"""What is given to `align score`, and whether an actor is killed."""


def run() -> dict[str, Any]:
    """All in turn, with the peak memory of the process that is called; the outputs must be the same bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows(folder / "rows.jsonl")
        found = {way: score(folder, way, more, kill=kill) for way, (more, kill) in WAYS.items()}
        if len({(folder / f"{way}.jsonl").read_bytes() for way in WAYS}) > 1:
            raise ValueError("the outputs differ")
    Console(width=120).print(_table(found))
    about = {"date": time.strftime("%Y-%m-%d"), "rows": ROWS, "scorer": SCORER}
    return {
        "machine": machine(torch.device("cpu")) | {"ray": version("ray")},
        **about,
        "same_bytes": True,
        "runs": found,
    }


def rows(path: Path) -> None:
    """Beginnings of the shipped stories, each row with a prompt of its own."""
    lists = [record.row for record in stream_rows(LISTS)]
    texts = ((one.prompt, text[:CHARACTERS]) for one in lists for text in one.completions)  # type: ignore[union-attr]
    with path.open("w", encoding="utf-8") as file:
        for number, (prompt, text) in enumerate(islice(cycle(list(texts)), ROWS)):
            file.write(json.dumps({"id": number, "prompt": f"{number}: {prompt}", "completions": [text]}) + "\n")


def score(folder: Path, name: str, more: list[str], *, kill: bool) -> dict[str, Any]:
    """`align score` of all rows: seconds of it all and of the scoring, peak memory, and the actor that was killed."""
    output, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    command = [sys.executable, "-m", "align.cli", "score", str(folder / "rows.jsonl"), str(output)]
    command += ["--reward", SCORER, "--no-cache", "--window", str(WINDOW), *more]
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = {"load_before": os.getloadavg()[0], "killed": None}
    parts = output.with_name(output.name + ".parts")
    first = done = 0.0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
            found["peak_mib"] = int(peak[1]) / 1024
        count = len(list(parts.glob("part-*")))
        first = first or (time.monotonic() if count else 0.0)
        done = time.monotonic() if count < ROWS // WINDOW else done
        if kill and not found["killed"] and count > KILL_AT * ROWS / WINDOW:
            actor, pid = STARTED.findall(log.read_text())[-1]  # the first may have died before, where memory is short
            os.kill(int(pid), signal.SIGKILL)
            found["killed"] = actor
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(log.read_text()[-3000:])
    found["deaths"] = log.read_text().count("an actor died")
    seconds = {"seconds": time.monotonic() - began, "scoring_seconds": done - first}
    return {**found, **seconds, "rows_per_second": ROWS / (done - first)}


def _table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table("", "seconds", "of scoring", "rows/s", "peak MiB of the command", title=f"{ROWS} rows")
    for way, one in found.items():
        figures = (f"{one[name]:.0f}" for name in ("seconds", "scoring_seconds", "rows_per_second", "peak_mib"))
        table.add_row(way, *figures)
    return table
