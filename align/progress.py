"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 15.0
"""Seconds between plain lines."""


class Advance(Protocol):
    """Called with how much was done since the last call, and a note to show beside it."""

    def __call__(self, done: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(label: str, total: int, *, unit: str, start: int = 0, show: bool = True) -> Iterator[Advance]:
    """Show how far work on `total` things has come; `start` of them were done before."""
    if not show:
        yield lambda done=1, note="": None
    elif sys.stderr.isatty():
        with _bar(label, total, unit, start) as advance:
            yield advance
    else:
        yield _Lines(label, total, unit, start)


@contextmanager
def _bar(label: str, total: int, unit: str, start: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=total, completed=start, rate="", note="")
        began = time.monotonic()

        def advance(done: int = 1, note: str = "") -> None:
            completed = bars.tasks[0].completed + done
            rate = (completed - start) / max(time.monotonic() - began, 1e-9)
            bars.update(task, completed=completed, rate=f"{rate:.1f}/s", note=note)

        yield advance


class _Lines:
    def __init__(self, label: str, total: int, unit: str, start: int) -> None:
        self.label, self.total, self.unit, self.start = label, total, unit, start
        self.done = start
        self.began = self.printed = time.monotonic()

    def __call__(self, done: int = 1, note: str = "") -> None:
        self.done += done
        now = time.monotonic()
        if now - self.printed < LINE_SECONDS and self.done < self.total:
            return
        self.printed = now
        rate = (self.done - self.start) / max(now - self.began, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        line = f"{self.label} {self.done}/{self.total} {self.unit}, {rate:.1f}/s, {left:.0f} s left"
        print(f"{line}; {note}" if note else line, file=sys.stderr, flush=True)
