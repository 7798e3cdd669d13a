"""A server that answers what it should not: no reward of it is taken, nobody waits for it, and no key is told."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from align.errors import UserError
from align.rollout.server import VllmServers
from rewards import ScorerError, client, load_scorer

DATA = [{"index": 0, "probs": [0.5]}, {"index": 1, "probs": [1.5]}]


@contextmanager
def serving(write: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that writes what it likes to each connection."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(2**16)
            try:
                write(connection)
            except OSError:
                return

    with socket.create_server(("localhost", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://localhost:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def drip(head: bytes) -> Callable[[socket.socket], None]:
    """A head, then a byte now and then, for ever."""

    def write(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"a")
            time.sleep(0.1)

    return write


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n"])
def test_a_server_that_is_never_silent_and_never_done_ends_at_the_deadline(head):
    with serving(drip(head)) as url:
        began = time.monotonic()
        with pytest.raises(client.Passing):
            client.Client(timeout=0.5).send(url)
        assert time.monotonic() - began < 20, "half a second, and a busy machine"


def test_an_answer_is_read_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(client, "LONGEST_ANSWER", 2**20)

    def write(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            connection.sendall(b"a" * 2**16)

    with serving(write) as url, pytest.raises(client.Refused, match="longer than 1,048,576 bytes"):
        client.Client(timeout=60).send(url)


def answering(monkeypatch, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    """Every client is answered so."""
    made = httpx.Client
    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(client.httpx, "Client", lambda **options: made(**options | {"transport": transport}))
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)


def test_a_redirect_is_not_followed(monkeypatch):
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(307, headers={"Location": "http://elsewhere/classify"})

    answering(monkeypatch, answer)
    with pytest.raises(ScorerError, match="it sends to http://elsewhere/classify; give that address"):
        load_scorer({"name": "served", "url": "http://here", "model": "rm"}).score(["a"], ["b"])
    assert asked == ["here"]


@pytest.mark.parametrize("code", [401, 500])
def test_no_key_and_no_password_is_told(monkeypatch, code):
    answering(monkeypatch, lambda request: httpx.Response(code, text=f"bad key {request.headers['authorization']}"))
    monkeypatch.setenv("KEY", "sk-secret-of-mine")
    with pytest.raises(UserError) as refused:
        VllmServers(["http://here"], api_key="KEY", tries=1)
    assert "bad key" in str(refused.value) and "sk-secret" not in str(refused.value)
    with pytest.raises(ScorerError) as failed:
        load_scorer({"name": "served", "url": "http://me:pass-word@here", "model": "rm"}).score(["a"], ["b"])
    assert "//***@here/classify" in str(failed.value) and "pass-word" not in str(failed.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DATA[:1], "1 results for 2 texts"),
        ([*DATA, DATA[0]], "3 results for 2 texts"),
        ([DATA[0], DATA[0]], r"`index` are \[0, 0\], not 0 to 1 once each"),
        ([DATA[0], {**DATA[1], "index": 2}], "not 0 to 1 once each"),
        ([DATA[0], {**DATA[1], "index": True}], "not 0 to 1 once each"),
        ([DATA[0], {**DATA[1], "index": "1"}], "not 0 to 1 once each"),
        ([DATA[0], {**DATA[1], "probs": ["1.5"]}], "a result is '1.5', and no number"),
        ([DATA[0], {**DATA[1], "probs": "15"}], "a result is '1', and no number"),
        ([DATA[0], {**DATA[1], "probs": [True]}], "a result is True, and no number"),
        ([DATA[0], {**DATA[1], "probs": [float("nan")]}], "a result is nan, and no number"),
        ([DATA[0], {**DATA[1], "probs": []}], "holds no classify result"),
        ([DATA[0], 3], "holds no classify result"),
        (3, "holds no classify result"),
    ],
    ids=str,
)
def test_rewards_are_numbers_each_of_its_own_text(monkeypatch, data, said):
    answering(monkeypatch, lambda request: httpx.Response(200, text=json.dumps({"data": data})))
    with pytest.raises(ScorerError, match=said):
        load_scorer({"name": "served", "url": "http://here", "model": "rm"}).score(["a", "b"], ["c", "d"])


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "null", "1" * 9999])
def test_an_answer_that_is_no_object_is_a_sentence(monkeypatch, text):
    answering(monkeypatch, lambda request: httpx.Response(200, text=text))
    with pytest.raises(ScorerError):
        load_scorer({"name": "served", "url": "http://here", "model": "rm"}).score(["a"], ["b"])
    with pytest.raises(UserError):
        VllmServers(["http://here"], tries=1)


CHOICE = {"index": 0, "token_ids": [5], "finish_reason": "length", "logprobs": {"token_logprobs": [0.0]}}


@pytest.mark.parametrize(
    "choices",
    [
        [],
        [CHOICE, CHOICE],
        [{**CHOICE, "index": 1}],
        [{**CHOICE, "token_ids": [5, 6]}],
        [{**CHOICE, "token_ids": ["5"]}],
        [{**CHOICE, "token_ids": [-5]}],
        [{**CHOICE, "logprobs": None}],
        [{**CHOICE, "logprobs": {"token_logprobs": [None]}}],
        [{**CHOICE, "logprobs": {"token_logprobs": ["0"]}}],
    ],
    ids=str,
)
def test_completions_are_whole(monkeypatch, choices):
    def answer(request: httpx.Request) -> httpx.Response:
        found = {"data": [{"id": "m"}]} if request.url.path == "/v1/models" else {"choices": choices}
        return httpx.Response(200, json=found)

    answering(monkeypatch, answer)
    with pytest.raises(UserError, match="with others in number, order or kind"):
        VllmServers(["http://here"], tries=1)
