"""Work on windows in several processes, its results in order and only a few of them in memory."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import get_context
from multiprocessing.pool import Pool
from typing import Any, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")
AHEAD = 4
"""Windows per process that are given out together."""


def in_order(work: Callable[[Given], Made], windows: Iterable[Given], workers: int) -> Iterator[Made]:
    """What `map` gives, from so many processes; an error of one of them is raised here."""
    if workers == 1:
        yield from map(work, windows)
        return
    rest = iter(windows)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of a tokenizer do not survive a fork
    try:
        with _pool(work, workers) as pool:
            while group := list(islice(rest, AHEAD * workers)):
                yield from pool.map(_work, group, chunksize=1)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _pool(work: Callable[[Any], Any], workers: int) -> Pool:
    """Processes that SIGTERM ends at any moment.

    A pool ends its processes with that signal, and waits for them. Python forgets a signal that a new process gets
    before Python runs in it, where the old one handles such signals; so it is held back until the process can take it.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    try:
        return get_context().Pool(workers, initializer=_take, initargs=(work,))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


_given: list[Callable[[Any], Any]] = []


def _take(work: Callable[[Any], Any]) -> None:
    _given[:] = [work]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


def _work(window: Any) -> Any:
    return _given[0](window)
