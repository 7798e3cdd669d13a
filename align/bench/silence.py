"""How long the quick start leaves its user without a sign of life: what it writes to a terminal, and when."""

import os
import pty
import re
import select
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from align.bench.measure import machine

COMMAND = ("-m", "align.cli", "train", "recipes/lipo_lambda.yaml")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\x00-\x09\x0b-\x1f]")
SHOWN = 10
"""Longest silences in the table."""


@dataclass(frozen=True)
class Silence:
    """A time in which nothing was written."""

    seconds: float
    began: float
    """Seconds after the start."""
    after: str
    """The last words before it."""


def run() -> dict[str, Any]:
    """Run the quick start with empty caches in a terminal of its own; run it in the project's root."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"HF_HOME": f"{folder}/hf", "XDG_CACHE_HOME": f"{folder}/cache", "TERM": "xterm-256color"}
        command = [sys.executable, *COMMAND, f"output={folder}/run"]
        found, total, status = silences(command, own)
    longest = sorted(found, key=lambda silence: -silence.seconds)[:SHOWN]
    table = Table("silent for", "from", "after", title=f"{total:.0f} s, exit {status}", title_justify="left")
    for silence in longest:
        table.add_row(f"{silence.seconds:.1f} s", f"{silence.began:.1f} s", silence.after)
    Console(width=150).print(table)
    return {
        "machine": machine(torch.device("cpu")),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": total,
        "exit": status,
        "longest": [asdict(silence) for silence in longest],
    }


def silences(command: Sequence[str], environment: Mapping[str, str]) -> tuple[list[Silence], float, int]:
    """Run a command in a terminal.

    Returns:
        Every time in which it wrote nothing, how many seconds it ran, and its exit status.
    """
    found: list[Silence] = []
    began = last = time.monotonic()
    words = "(the start)"
    pieces = _pieces(command, environment)
    while True:
        try:
            text = next(pieces)
        except StopIteration as end:
            now = time.monotonic()
            found.append(Silence(now - last, last - began, words))
            return found, now - began, end.value
        now = time.monotonic()
        found.append(Silence(now - last, last - began, words))
        last = now
        lines = [line.strip() for line in CONTROL.sub("\n", text).splitlines() if line.strip()]
        words = lines[-1][:80] if lines else words


def _pieces(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """What a command writes to its terminal, as it comes; at the end its exit status."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe(command[0], list(command), os.environ | dict(environment))
    while select.select([terminal], [], []):
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not piece:
            break
        yield piece.decode(errors="replace")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status)  # type: ignore[return-value]
