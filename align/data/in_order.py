"""Work on windows in several processes, its results in order and only a few of them in memory."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import get_context
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
        with get_context().Pool(workers, initializer=_take, initargs=(work,)) as pool:
            while group := list(islice(rest, AHEAD * workers)):
                yield from pool.map(_work, group, chunksize=1)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_given: list[Callable[[Any], Any]] = []


def _take(work: Callable[[Any], Any]) -> None:
    _given[:] = [work]


def _work(window: Any) -> Any:
    return _given[0](window)
