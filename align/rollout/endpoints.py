"""Which of several servers gets the next request, and what becomes of one that does not answer."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from align.errors import UserError
from rewards.client import Passing, wait_after

log = logging.getLogger("align")

POLL = 0.05
"""Seconds after which a request looks again whether another one has found a server to answer."""

T = TypeVar("T")


@dataclass
class Endpoint:
    """A server, and how it has been lately."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row; 0 where it answers."""
    again_at: float = 0.0
    """When the next attempt at one that failed is due."""
    failed_at: float = 0.0
    problem: str = ""
    """What the last failure was."""
    ready: bool = False
    """Whether it was looked at since it began to answer, and holds the policy."""


class Endpoints:
    """Requests go to the server with the fewest in flight; one that failed is left alone for longer and longer."""

    def __init__(
        self,
        urls: Sequence[str],
        prepare: Callable[[str], None],
        *,
        tries: int,
        first_wait: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Args:
        prepare: what is done with a server before its first request, and before the first after it was gone.
        tries: attempts at one request, and at one server in a row.
        first_wait: seconds after a server's first failure; they double with every other one.
        """
        self.all = [Endpoint(url) for url in urls]
        self.prepare, self.tries, self.first_wait, self.clock, self.sleep = prepare, tries, first_wait, clock, sleep
        self.lock = threading.Lock()

    def everywhere(self) -> None:
        """Prepare every server that answers; the others are prepared when they do.

        Raises:
            UserError: none answers.
        """
        for endpoint in self.all:
            endpoint.ready = False
            if not endpoint.failures:
                with contextlib.suppress(Passing):
                    self._try(endpoint, lambda url: None)
        self.anywhere(lambda url: None)

    def anywhere(self, request: Callable[[str], T]) -> T:
        """A request's answer, from whichever server gives one.

        Raises:
            UserError: no server answers, or this request failed as often as it may.
        """
        for _ in range(self.tries):
            endpoint = self._take()
            try:
                return self._try(endpoint, request)
            except Passing as error:
                problem = error
            finally:
                with self.lock:
                    endpoint.in_flight -= 1
        said = f"{endpoint.url} failed, the last of {self.tries} attempts at a request: {problem}"
        raise UserError(f"rollout.engine.urls: {said}; start it, then go on")

    def _take(self) -> Endpoint:
        """The server for a request; waits while none is there that may be asked."""
        while True:
            with self.lock:
                now = self.clock()
                if all(one.failures >= self.tries for one in self.all):
                    reasons = "; ".join(f"{one.url} does not answer ({one.problem})" for one in self.all)
                    raise UserError(f"rollout.engine.urls: {reasons}; start it, or take it out")
                due = [one for one in self.all if one.failures and not one.in_flight and one.again_at <= now]
                well = [one for one in self.all if not one.failures]
                if due or well:
                    chosen = (due or sorted(well, key=lambda one: one.in_flight))[0]
                    chosen.in_flight += 1
                    return chosen
                wait = min(one.again_at for one in self.all) - now
            self.sleep(max(wait, POLL))

    def _try(self, endpoint: Endpoint, request: Callable[[str], T]) -> T:
        """One attempt; what came of it is what the server is from now on."""
        began = self.clock()
        try:
            if not endpoint.ready:
                self.prepare(endpoint.url)
                endpoint.ready = True
            answer = request(endpoint.url)
        except Passing as error:
            self._failed(endpoint, began, error)
            raise
        with self.lock:
            back = endpoint.failures and endpoint.ready
            endpoint.failures = 0 if endpoint.ready else endpoint.failures
        if back:
            log.warning("%s answers again", endpoint.url)
        return answer

    def _failed(self, endpoint: Endpoint, began: float, error: Passing) -> None:
        with self.lock:
            if endpoint.failures and began < endpoint.failed_at:
                return  # it was in flight when the server went, which is known
            endpoint.failures += 1
            endpoint.failed_at, endpoint.problem, endpoint.ready = self.clock(), str(error), False
            endpoint.again_at = endpoint.failed_at + wait_after(endpoint.failures, self.first_wait)
            first = endpoint.failures == 1
        if first:
            others = any(not one.failures for one in self.all)
            log.warning(
                "%s does not answer (%s); %s, and it is asked again now and then",
                endpoint.url,
                error,
                "the other servers go on" if others else "nothing is sampled until one does",
            )
