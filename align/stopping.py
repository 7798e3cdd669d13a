"""Signals and the end of a given time: where the work ends, and with which exit code."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
"""That end the work; SIGUSR1 is what Slurm warns with."""
OUT_OF_TIME = 75
"""Exit code of a run that its time limit has ended: EX_TEMPFAIL of sysexits.h, `the same command goes on`."""
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
"""What is replaced; a signal that somebody ignores, as `nohup` does, or handles stays theirs."""
SENT_ON_SECONDS = 1.0
"""Within which a second signal under a launcher is the first, which the launcher has sent on."""
RESERVE_SECONDS = 10.0
"""Of a time limit, or a twentieth of it: for what happens between the end of the work and that of the process."""


class Stopped(KeyboardInterrupt):
    """The work ends here, by a signal or at the end of its time; whoever handles an interrupt handles this."""

    def __init__(self, number: int, where: str = "", *, together: bool = False) -> None:
        """Args:
        number: of the signal; SIGALRM's for the end of the time.
        where: what is done, and kept.
        together: whether all processes have ended at the same place.
        """
        super().__init__(number)
        self.number, self.where, self.together = number, where, together

    @property
    def code(self) -> int:
        """The process's exit code: 128 + the signal's number, or OUT_OF_TIME."""
        return exit_code(self.number)

    def __str__(self) -> str:
        by = "train.time_limit is over" if self.number == signal.SIGALRM else f"stopped by {name_of(self.number)}"
        return f"{by}{self.where}"


class _Came:
    """What has come to this process."""

    pid = 0
    first = 0
    """Number of the first signal; 0 for none."""
    when = 0.0
    waits = False
    """Whether the work looks by itself, at places where it can end."""
    began: float | None = None
    """When the command began; None where it is none."""
    ends = math.inf


def exit_code(number: int) -> int:
    return OUT_OF_TIME if number == signal.SIGALRM else 128 + number


def name_of(number: int) -> str:
    return signal.Signals(number).name


def came() -> int:
    """The number of the signal that has come, SIGALRM's for the end of the time, 0 for none."""
    return _Came.first


@contextmanager
def stoppable(began: float | None = None) -> Iterator[None]:
    """Inside, a signal raises Stopped where the work is, and a second one ends the process at once.

    Nothing is changed outside of the main thread, nor within another such context.

    Args:
        began: when the command began, by time.monotonic, from where its time counts; None where it is none.
    """
    if threading.current_thread() is not threading.main_thread() or _Came.pid == os.getpid():
        yield
        return
    replaced: dict[int, Any] = {number: own for number in SIGNALS if (own := signal.getsignal(number)) in DEFAULTS}
    replaced[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
    _Came.pid, _Came.first, _Came.waits, _Came.began = os.getpid(), 0, False, began
    for number in replaced:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, own in replaced.items():
            signal.signal(number, own)
        _Came.pid = 0


@contextmanager
def between_steps() -> Iterator[Callable[[], int]]:
    """Inside, a signal is only noted: the work asks by `came`, and ends where it can; a second one ends it at once."""
    with stoppable():
        if _Came.first:  # between the last look and here
            raise Stopped(_Came.first)
        _Came.waits = True
        try:
            yield came
        finally:
            _Came.waits = False


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Inside, the end of the time is a signal like others.

    Args:
        seconds: from the begin of the command, or from here where it is called from Python; None for no end.
    """
    with stoppable():
        if seconds is None:
            yield
            return
        began = time.monotonic() if _Came.began is None else _Came.began
        _Came.ends = began + seconds - min(RESERVE_SECONDS, seconds / 20)
        timed = _Came.pid == os.getpid()
        if timed:
            signal.setitimer(signal.ITIMER_REAL, max(left(), 1e-3))
        try:
            yield
        finally:
            _Came.ends = math.inf
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)


def left() -> float:
    """Seconds until the given time is over; infinite where none was given."""
    return _Came.ends - time.monotonic()


def _handle(number: int, _: Any) -> None:
    if os.getpid() != _Came.pid:  # a child that was forked, as those of a pool, which is ended so
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _Came.first not in (0, signal.SIGALRM):
        sent_on = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - _Came.when < SENT_ON_SECONDS
        if number != signal.SIGALRM and not sent_on:
            os._exit(exit_code(_Came.first))
        return
    _Came.first, _Came.when = int(number), time.monotonic()
    if not _Came.waits:
        raise Stopped(int(number))
