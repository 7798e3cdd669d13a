"""Where a run's messages go."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from align.runs.run_directory import RunDirectory

log = logging.getLogger("align")
_one_of_many = ContextVar("_one_of_many", default=False)


class _Terminal(logging.StreamHandler):
    """Writes to sys.stderr as it is at the time, so that a live bar, which takes its place, stays below the message."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start_log(run: RunDirectory, *, main: bool) -> None:
    """Messages go to the terminal and, with the time, to events.log; debug messages to the latter alone."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.DEBUG if main else logging.ERROR)
    console = _Terminal()
    console.setLevel(logging.WARNING if is_one_of_many() else logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)
    if main:
        file = logging.FileHandler(run.events)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


@contextmanager
def one_of_many() -> Iterator[None]:
    """Within, what a run says that is no warning goes to its events.log alone: who makes many says a line of each."""
    token = _one_of_many.set(True)
    try:
        yield
    finally:
        _one_of_many.reset(token)


def is_one_of_many() -> bool:
    """Whether a run is to be brief."""
    return _one_of_many.get()
