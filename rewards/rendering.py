"""A chat template comes with a model, so a stranger may have written it: it renders in bounds, its faults are words.

transformers renders in jinja's sandbox, where a template reaches nothing of Python's; but it may loop for ever, or
write more than there is memory.
"""

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""Of computing, for one conversation; a long one with tools takes milliseconds."""
ROOM = 4 * 2**30
"""Bytes that a process may grow by meanwhile."""
LONGEST = 2**28
"""Characters of a rendered conversation."""


class Unrendered(ValueError):
    """A template refuses a conversation, or fails at it."""


class OutOfBounds(Unrendered):
    """It takes more time or memory than any conversation needs."""


def rendered(tokenizer: "PreTrainedTokenizerBase", messages: Any, **options: Any) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Raises:
        Unrendered: it does not, for whatever reason; what a template raises is its own.

    Source: transformers' `apply_chat_template`
    """
    try:
        with bounded():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Unrendered:
        raise
    except Exception as error:
        raise Unrendered(str(error) or type(error).__name__) from None
    if len(text) > LONGEST:
        raise OutOfBounds(f"it writes {len(text):,} characters for one conversation, and {LONGEST:,} are the most")
    return text


@contextmanager
def bounded() -> Iterator[None]:
    """A limit of computing time and one of memory around a template, in a process's main thread, where they can be set.

    Raises:
        OutOfBounds: one is reached, or the template calls itself without end.
    """
    main = threading.current_thread() is threading.main_thread()
    try:
        with _limits() if main else nullcontext():
            yield
    except MemoryError:
        raise OutOfBounds(f"it takes more than {ROOM >> 30} GiB of memory for one conversation") from None
    except RecursionError:
        raise OutOfBounds("it calls itself without end") from None


@contextmanager
def _limits() -> Iterator[None]:
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with growing_by(ROOM):
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def growing_by(room: int) -> Iterator[None]:
    """A limit of the bytes that this process may grow by, where one can be set; what asks for more is a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _in_use(int(time.monotonic())) + room
    try:
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop(*_: Any) -> None:
    raise OutOfBounds(f"it takes more than {SECONDS:g} s of computing for one conversation")


@lru_cache(maxsize=1)
def _in_use(second: int) -> int:
    """Bytes of this process's address space, looked at once a second."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux
        return 2**46
