"""Requests to servers over HTTP: one client, and one rule for what is tried again and after how long."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpcore
import httpx

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP codes after which another attempt may succeed."""
LONGEST_WAIT = 30.0
"""Seconds between two attempts, at most."""
LONGEST_ANSWER = 64 * 2**20
"""Bytes of one answer."""
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
        timeout: seconds until an answer is there to its last byte, however slowly it comes.
        headers: of every request; what they say is kept out of messages.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        kinds = {"Content-Type": "application/json", **(headers or {})}
        self.timeout = timeout
        self.secrets = [word for value in (headers or {}).values() for word in value.split() if len(word) > 6]
        transport = httpx.HTTPTransport(limits=limits)
        transport._pool._network_backend = _Network()  # which httpx itself does not offer
        self.http = httpx.Client(timeout=timeout, headers=kinds, transport=transport, follow_redirects=False)

    def send(self, url: str, content: Any = None) -> bytes:
        """The body of an answer; a request without content asks, one with it posts it as JSON.

        Raises:
            Passing: no answer in time, or one that says to try again.
            Refused: any other answer than a good one, one that is too long or from elsewhere, or no address.
        """
        body = None if content is None else json.dumps(content).encode()
        try:
            return self._send("GET" if body is None else "POST", url, body)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise Refused(None, self._told(str(error))) from None
        except httpx.HTTPError as error:
            raise Passing(self._told(str(error)) or type(error).__name__) from None

    def _send(self, method: str, url: str, body: bytes | None) -> bytes:
        with DEADLINE.of(self.timeout), self.http.stream(method, url, content=body) as response:
            code = response.status_code
            said = self._read(response, LONGEST_ANSWER if response.is_success else SAID)
            if code in PASSING:
                raise Passing(f"HTTP {code}: {self._told(said.decode(errors='replace'))}")
            if response.has_redirect_location:
                raise Refused(
                    code, f"it sends to {response.headers['location']:.200}; give that address, if it is yours"
                )
            if not response.is_success:
                raise Refused(code, self._told(said.decode(errors="replace")))
            return said

    def _read(self, response: httpx.Response, most: int) -> bytes:
        """The body; of a good answer all of it, of another its beginning."""
        found = b""
        for part in response.iter_bytes(2**16):
            found += part
            if len(found) > most:
                if response.is_success:
                    raise Refused(response.status_code, f"its answer is longer than {most:,} bytes")
                break
        return found[:most]

    def _told(self, said: str) -> str:
        """A server's words without the key that it was sent."""
        for secret in self.secrets:
            said = said.replace(secret, "***")
        return said[:SAID]


def without_password(url: str) -> str:
    """An address for messages."""
    return re.sub(r"//[^/@]*@", "//***@", url)


class _Deadline(threading.local):
    """When a thread's request is to be over; httpx knows how long a server may be silent, not how long it may take."""

    at: float | None = None

    @contextmanager
    def of(self, seconds: float) -> Iterator[None]:
        """A request that may take so long."""
        self.at = time.monotonic() + seconds
        try:
            yield
        finally:
            self.at = None

    def left(self, silence: float | None) -> float | None:
        """Seconds that one more read may take."""
        if self.at is None:
            return silence
        left = self.at - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the answer takes too long")
        return left if silence is None else min(left, silence)


DEADLINE = _Deadline()


class _InTime(httpcore.NetworkStream):
    """A connection whose reads together end at the deadline of the thread that reads."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self.stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, DEADLINE.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, DEADLINE.left(timeout))

    def close(self) -> None:
        self.stream.close()

    def start_tls(self, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        return _InTime(self.stream.start_tls(*args, **kwargs))

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


class _Network(httpcore.SyncBackend):
    def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        return _InTime(super().connect_tcp(*args, **kwargs))


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
