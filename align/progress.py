"""Progress of long work: a bar on a terminal, a line that changes in a notebook, plain lines elsewhere.

Whatever takes more than a moment announces itself here before it begins, so that nobody looks at a still screen.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

LINE_SECONDS = 15.0
"""Seconds between plain lines."""
NOTEBOOK_SECONDS = 0.5
"""Seconds between changes of a notebook's line."""
BAR = 12
"""Characters of a bar."""
MOMENT = 0.5
"""What took fewer seconds is not worth a line at its end."""


class Advance(Protocol):
    """Called with how much was done since the last call, and a note to show beside it from now on."""

    def __call__(self, done: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(
    label: str, total: int | None = None, *, unit: str = "", start: int = 0, show: bool = True
) -> Iterator[Advance]:
    """Show how far work on `total` things has come; `start` of them were done before. Only the main process shows it.

    Args:
        label: what is done, before it begins.
        total: None where nobody knows; see `stage`.
        show: False for no word at all.
    """
    if not show or os.environ.get("RANK", "0") != "0":
        yield lambda done=1, note="": None
        return
    work = _Work(label, total, unit, start)
    with _display()(work):
        yield work.advance


@contextmanager
def stage(label: str, *, show: bool = True) -> Iterator[None]:
    """Show that work of unknown length goes on, and for how long it has; before a function, all of its calls."""
    with progress(label, show=show):
        yield


class _Work:
    """What is done, how far it has come, and that in words."""

    def __init__(self, label: str, total: int | None, unit: str, start: int) -> None:
        self.label, self.total, self.unit, self.start = label, total, unit, start
        self.done, self.note = start, ""
        self.began, self.ended = time.monotonic(), 0.0
        self.changed: Callable[[], None] = lambda: None
        """Called after every advance."""

    def advance(self, done: int = 1, note: str = "") -> None:
        self.done += done
        self.note = note or self.note
        self.changed()

    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.began

    def words(self) -> str:
        """Count, rate and remaining time, or the time so far."""
        if self.total is None:
            return in_time(self.seconds())
        words = f"{self.done}/{_in_units(self.total, self.unit)}"
        if new := self.done - self.start:
            rate = new / max(self.seconds(), 1e-9)
            left = max(self.total - self.done, 0) / rate
            words += f", {rate:.1f}/s, " + (f"{in_time(left)} left" if left else in_time(self.seconds()))
        return f"{words}; {self.note}" if self.note else words


def counted(number: int, thing: str) -> str:
    """`1 list`, `2 lists`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _in_units(number: int, unit: str) -> str:
    """`1 list` of the unit `lists`."""
    return f"{number} {unit.removesuffix('s') if number == 1 else unit}"


def in_time(seconds: float) -> str:
    """A duration in words: `12 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _display() -> Callable[[_Work], AbstractContextManager[None]]:
    console = Console(stderr=True)
    if console.is_jupyter:
        return _in_notebook
    return _on_terminal if sys.stderr.isatty() else _in_lines


class _Words(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["work"].words(), style="progress.remaining")


class _Shared:
    """The one live display of a terminal: work within work is another line of it."""

    bars: Progress | None = None
    users = 0


@contextmanager
def _on_terminal(work: _Work) -> Iterator[None]:
    if _Shared.bars is None:
        columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description}", markup=False), BarColumn(BAR))
        words = _Words(table_column=Column(no_wrap=True, overflow="ellipsis"))
        _Shared.bars = Progress(*columns, words, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty())
        _Shared.bars.start()
    bars = _Shared.bars
    _Shared.users += 1
    task = bars.add_task(work.label, total=work.total, completed=work.start, work=work)
    work.changed = lambda: bars.update(task, completed=work.done)
    try:
        yield
    finally:
        _end_line(bars, task, work)
        _Shared.users -= 1
        if not _Shared.users:
            bars.stop()
            _Shared.bars = None


def _end_line(bars: Progress, task: Any, work: _Work) -> None:
    """The line that stays: none of a short stage, nor of work within other work, of which there may be any number."""
    work.ended = time.monotonic()
    if _Shared.users > 1 or (work.total is None and work.seconds() < MOMENT):
        bars.remove_task(task)
    elif work.total is not None:
        bars.stop_task(task)
    else:
        bars.update(task, total=1, completed=1)


@contextmanager
def _in_lines(work: _Work) -> Iterator[None]:
    printed = 0.0

    def say(words: str) -> None:
        nonlocal printed
        printed = time.monotonic()
        print(words, file=sys.stderr, flush=True)

    def when_due() -> None:
        if time.monotonic() - printed >= LINE_SECONDS:
            say(f"{work.label} {work.words()}")

    def changed() -> None:
        if work.done == work.total and (work.note or work.seconds() > MOMENT):
            say(f"{work.label} {work.words()}")
        else:
            when_due()

    say(work.label if work.total is None else f"{work.label}: {_in_units(work.total - work.start, work.unit)}")
    work.changed = changed
    with _every(LINE_SECONDS, when_due):
        yield


@contextmanager
def _in_notebook(work: _Work) -> Iterator[None]:
    from IPython.display import display  # a notebook has it

    def shown() -> dict[str, str]:
        share = min(work.done / work.total, 1.0) if work.total else 0.0
        full = round(BAR * share)
        bar = "█" * full + "░" * (BAR - full) + " " if work.total else ""
        return {"text/plain": f"{work.label} {bar}{work.words()}"}

    handle = display(shown(), raw=True, display_id=True)
    try:
        with _every(NOTEBOOK_SECONDS, lambda: handle.update(shown(), raw=True)):
            yield
    finally:
        handle.update(shown(), raw=True)


@contextmanager
def _every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call something at intervals while the body runs, whatever the body is busy with."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(seconds):
            call()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
