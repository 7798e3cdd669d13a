"""Windows of rows through actors: few in flight, none lost with an actor.

Plain actors of Ray's core, not Ray Data: its blocks are Arrow tables, which rows of any shape are not, it would cut the
windows anew, which every command writes and resumes by, and it starts a dead actor again without end.
"""

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import UserError

DEPTH = 2
"""Windows that an actor has at a time: one that it works on, and the next."""
DEATHS = 3
"""Actors that one window may cost; one that takes more kills them itself."""
START_SECONDS = 600.0
"""Without any actor that has started, after which the cluster has no room for one."""

LAST_SECONDS = 60.0
"""For what a dead actor had finished to arrive."""

Work = Callable[[Any], Any]
Start = Callable[[], Work]

log = logging.getLogger("align")


class Worker:
    """What runs in the cluster: the same function that the command calls where there is none."""

    work: Work

    def start(self, start: Start, folder: str) -> str:
        """Get ready as the command would without a cluster; says where this is."""
        if Path(folder).is_dir():  # relative paths are those of the command
            os.chdir(folder)
        self.work = start()
        return f"process {os.getpid()} on {socket.gethostname()}"

    def run(self, window: Any) -> Any:
        return self.work(window)


@dataclass(eq=False)
class _Window:
    """What is handed out, and how many actors died while they worked on it."""

    content: Any
    deaths: int = 0


@dataclass(eq=False)
class _Actor:
    handle: Any
    started: bool = False
    windows: list[_Window] = field(default_factory=list)
    """In the order in which it works on them."""


class Shared:
    """A value that a machine of the cluster is sent once, however many windows name it."""

    latest: tuple[Any, Any] = (None, None)
    """The last one that this process has read."""

    def __init__(self, ray: Any, value: Any) -> None:
        self.ref = ray.put(value)

    def get(self) -> Any:
        import ray

        if Shared.latest[0] != self.ref:
            Shared.latest = self.ref, ray.get(self.ref)
        return Shared.latest[1]


class Pool:
    """Actors that work on windows until the pool is closed; see `Cluster.pool`."""

    def __init__(self, ray: Any, start: Start, *, count: int, resources: dict[str, float]) -> None:
        self.ray, self.count = ray, count
        self.remote = ray.remote(Worker).options(scheduling_strategy="SPREAD", **resources)
        self.resources = resources
        self.setup = (start, os.getcwd())
        self.actors: list[_Actor] = []
        self.asked: dict[Any, tuple[_Actor, _Window | None]] = {}
        """By what Ray will answer: the actor, and the window; None where it is starting."""
        self.failed_starts = 0

    def map(self, windows: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(window, what the work gave), as they finish.

        Windows are read when there is room for them: no more than DEPTH for each actor are held here and in the
        cluster together. A window whose actor dies goes to another one.

        Raises:
            UserError: actors die of one window again and again, or none starts; or what the work itself raises.
        """
        left, waiting = iter(windows), deque[_Window]()
        try:
            while self._hand_out(left, waiting):
                yield from self._answered(waiting)
        except BaseException:  # a reader that has left too: nobody wants what is in flight
            self.close()
            raise

    def share(self, value: Any) -> Shared:
        """A value for many windows."""
        return Shared(self.ray, value)

    def close(self) -> None:
        """End the actors, which keep nothing."""
        for actor in self.actors:
            self.ray.kill(actor.handle)
        self.actors, self.asked = [], {}

    def _hand_out(self, left: Iterator[Any], waiting: deque[_Window]) -> bool:
        """Give out windows, to the actor that has fewest first; whether there is anything to wait for."""
        held = len(waiting) + sum(len(actor.windows) for actor in self.actors)
        for _ in range(self.count * DEPTH - held):
            if (content := next(left, self)) is self:
                break
            waiting.append(_Window(content))
            held += 1
        while len(self.actors) < min(self.count, held):
            self._start()
        ready = [actor for actor in self.actors if actor.started]
        while ready and waiting and len((least := min(ready, key=lambda actor: len(actor.windows))).windows) < DEPTH:
            window = waiting.popleft()
            least.windows.append(window)
            self.asked[least.handle.run.remote(window.content)] = least, window
        return held > 0

    def _start(self) -> None:
        actor = _Actor(self.remote.remote())
        self.actors.append(actor)
        self.asked[actor.handle.start.remote(*self.setup)] = actor, None

    def _answered(self, waiting: deque[_Window]) -> Iterator[tuple[Any, Any]]:
        """Wait for one answer; it is none where an actor has started, or died."""
        some_work = any(actor.started for actor in self.actors)
        done, _ = self.ray.wait(list(self.asked), timeout=None if some_work else START_SECONDS)
        if not done:
            raise UserError(
                f"--ray: no actor has started within {START_SECONDS:.0f} s; the cluster has no room for "
                f"{self.resources['num_cpus']:g} cores and {self.resources['num_gpus']:g} GPUs (`ray status`), so give "
                "a smaller --gpus-per-actor, or wait until there is room"
            )
        actor, window = self.asked[done[0]]
        try:
            found = self._got(done[0])
        except self.ray.exceptions.RayError as error:  # of the actor, its machine or what it answered
            yield from self._bury(actor, error, waiting)
            return
        del self.asked[done[0]]
        if window is not None:
            actor.windows.remove(window)
            yield window.content, found
        else:
            actor.started, self.failed_starts = True, 0
            say(f"actor {actor.handle._actor_id.hex()} runs in {found}")

    def _got(self, answer: Any, timeout: float | None = None) -> Any:
        """An answer; what the work itself raised is raised as it was."""
        try:
            return self.ray.get(answer, timeout=timeout)
        except self.ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, Exception) else RuntimeError(str(error)) from None

    def _bury(self, actor: _Actor, error: Exception, waiting: deque[_Window]) -> Iterator[tuple[Any, Any]]:
        """Put a dead actor's windows back, but for those that it had finished, and count what it has cost.

        Raises:
            UserError: too many died of the same window, or before they had started.
        """
        why = _reason(error)
        self.actors.remove(actor)
        with suppress(Exception):  # one that Ray no longer reaches may still hold its memory
            self.ray.kill(actor.handle)
        own = {answer: window for answer, (whose, window) in self.asked.items() if whose is actor}
        self.asked = {answer: whose for answer, whose in self.asked.items() if answer not in own}
        lost: list[_Window] = []
        for answer, window in own.items():  # in the order in which it worked on them
            if window is not None:
                try:
                    found = self._got(answer, LAST_SECONDS)
                except self.ray.exceptions.RayError:
                    lost.append(window)
                else:
                    yield window.content, found
        waiting.extendleft(reversed(lost))
        self._count(actor, lost, why)
        log.warning("an actor died (%s); its windows go to another one, and no row is lost", why)

    def _count(self, actor: _Actor, lost: list[_Window], why: str) -> None:
        if not actor.started:
            self.failed_starts += 1
            if self.failed_starts >= DEATHS:
                raise UserError(f"--ray: {DEATHS} actors in a row died before they had started ({why})")
        if lost:
            lost[0].deaths += 1
            if lost[0].deaths >= DEATHS:
                raise UserError(
                    f"--ray: {DEATHS} actors died one after the other of the same window of rows ({why}); if memory is "
                    "short, give smaller windows or fewer tokens per batch; what is finished is kept"
                )


def say(words: str) -> None:
    """To a run's log, or on the terminal where there is none."""
    if log.handlers:
        log.info("%s", words)
    else:
        print(words, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    """What Ray says of a death, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("No module named 'align'" in line for line in lines):
        return "Align is not installed on the cluster's machines; install the same version there"
    said = [line for line in lines if "Error" in line or "died" in line.lower() or "killed" in line.lower()]
    return (said or lines or [type(error).__name__])[-1][:300]
