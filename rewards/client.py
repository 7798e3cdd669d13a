"""Requests to servers over HTTP: one client, and one rule for what is tried again and after how long."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP codes after which another attempt may succeed."""
LONGEST_WAIT = 30.0
"""Seconds between two attempts, at most."""
SAID = 500
"""Characters of a server's own words that a message repeats."""

T = TypeVar("T")


class Passing(Exception):
    """A failure that another attempt, or another server, may not have."""


class Refused(Exception):
    """The server will not do it, however often it is asked."""

    def __init__(self, code: int | None, said: str) -> None:
        super().__init__(f"HTTP {code}: {said}" if code else said)
        self.code = code
        """None where the address itself is no address."""


class Client:
    """Connections that are kept open and may be used by many threads at once."""

    def __init__(self, *, timeout: float, headers: Mapping[str, str] | None = None) -> None:
        """Args:
        timeout: seconds that a server may be silent.
        headers: of every request.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        kinds = {"Content-Type": "application/json", **(headers or {})}
        self.http = httpx.Client(timeout=timeout, headers=kinds, limits=limits)

    def send(self, url: str, content: Any = None) -> bytes:
        """The body of an answer; a request without content asks, one with it posts it as JSON.

        Raises:
            Passing: no answer, or one that says to try again.
            Refused: any other answer than a good one, or no address.
        """
        try:
            if content is None:
                response = self.http.get(url)
            else:
                response = self.http.post(url, content=json.dumps(content).encode())
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Refused(None, str(error)) from None
        except httpx.HTTPError as error:
            raise Passing(str(error) or type(error).__name__) from None
        if response.status_code in PASSING:
            raise Passing(f"HTTP {response.status_code}: {response.text[:SAID]}")
        if not response.is_success:
            raise Refused(response.status_code, response.text[:SAID])
        return response.content


def wait_after(failures: int, first_wait: float) -> float:
    """Seconds to leave a server alone after it failed so often in a row: twice as long every time."""
    return min(LONGEST_WAIT, first_wait * 2 ** (failures - 1))


def again(attempt: Callable[[], T], *, tries: int, first_wait: float = 1.0) -> T:
    """What an attempt gives, the first that does not fail in passing.

    Raises:
        Passing: all have; the last one's failure.
    """
    for failures in range(1, tries):
        try:
            return attempt()
        except Passing:
            time.sleep(wait_after(failures, first_wait))
    return attempt()
