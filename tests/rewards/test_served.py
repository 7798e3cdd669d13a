"""The HTTP scorer against a server of our own that speaks vLLM's /classify and /score."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from rewards import RowError, ScorerError, client, load_scorer
from rewards.types import Asked


class Stub(BaseHTTPRequestHandler):
    """A text's reward is its length; results come in reverse order, as `index` allows."""

    bodies: list[dict] = []
    failures = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Stub.bodies.append({"path": self.path, **body})
        if Stub.failures:
            Stub.failures -= 1
            self.answer(503, {"error": "busy"})
        elif "refuse" in json.dumps(body):
            self.answer(400, {"error": "no such conversation"})
        elif self.path == "/classify":
            texts = body.get("input") or [" ".join(m["role"] + m["content"] for m in body["messages"])]
            data = [{"index": i, "probs": [0.0, float(len(text))]} for i, text in enumerate(texts)]
            self.answer(200, {"data": data[::-1]})
        else:
            data = [{"index": i, "score": len(body["text_1"]) + len(t) / 10} for i, t in enumerate(body["text_2"])]
            self.answer(200, {"data": data[::-1]})

    def answer(self, code: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def waits() -> list[float]:
    """The seconds between attempts, which nobody waits here."""
    return []


@pytest.fixture
def spec(monkeypatch, waits) -> Iterator[dict]:
    monkeypatch.setattr(Stub, "bodies", [])
    monkeypatch.setattr(Stub, "failures", 0)
    monkeypatch.setattr(client.time, "sleep", waits.append)
    server = ThreadingHTTPServer(("localhost", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"name": "served", "url": f"http://localhost:{server.server_port}/", "model": "rm", "label": 1}
    server.shutdown()


def test_classify_scores_joined_texts_and_conversations(spec):
    prompts = ["a", "ab", [{"role": "user", "content": "a"}], "abc"]
    completions = ["b", "c", [{"role": "assistant", "content": "bb"}], "d"]
    scorer = load_scorer({**spec, "texts_per_request": 2, "requests_at_once": 1})
    assert scorer.score(prompts, completions) == [2.0, 3.0, float(len("usera assistantbb")), 4.0]
    assert [body.get("input") for body in Stub.bodies] == [["ab", "abc"], None, ["abcd"]]
    assert all(body["use_activation"] is False and body["model"] == "rm" for body in Stub.bodies), "logits by default"


def test_many_requests_at_once_keep_the_order(spec):
    completions = ["x" * (1 + i % 7) for i in range(50)]
    scorer = load_scorer({**spec, "texts_per_request": 3, "requests_at_once": 4})
    assert scorer.score(["p"] * 50, completions) == [1.0 + len(own) for own in completions]


def test_score_asks_once_for_the_completions_of_a_prompt(spec):
    scorer = load_scorer({**spec, "endpoint": "score", "requests_at_once": 1})
    assert scorer.score(["p", "p", "qq"], ["a", "ab", "abc"]) == pytest.approx([1.1, 1.2, 2.3])
    assert [body["text_2"] for body in Stub.bodies] == [["a", "ab"], ["abc"]]


def test_a_failure_that_passes_is_tried_again(spec, waits, monkeypatch):
    monkeypatch.setattr(Stub, "failures", 4)
    assert load_scorer(spec).score(["a"], ["b"]) == [2.0]
    assert waits == [1.0, 2.0, 4.0, 8.0]
    monkeypatch.setattr(Stub, "failures", 5)
    with pytest.raises(ScorerError, match="no answer after 5 attempts .HTTP 503"):
        load_scorer(spec).score(["a"], ["b"])


def test_what_the_server_cannot_do_is_said(spec):
    with pytest.raises(RowError, match="refuses the request: HTTP 400: .*no such conversation"):
        load_scorer(spec).score(["refuse"], ["b"])
    with pytest.raises(ScorerError, match="holds no classify result"):
        load_scorer({**spec, "label": 2}).score(["a"], ["b"])
    with pytest.raises(ScorerError, match="is the server running"):
        load_scorer({**spec, "url": "http://localhost:9"}).score(["a"], ["b"])


@pytest.mark.parametrize("code", [200, 204, 301, 400, 401, 404, 408, 413, 422, 425, 429, 500, 501, 502, 503, 504])
def test_every_code_has_its_kind(code):
    """A good answer, one to ask for again, or a refusal with the server's own words; asked and posted alike."""
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, request.content))
        return httpx.Response(code, text="its words")

    own = client.Client(timeout=1.0)
    own.http = httpx.Client(transport=httpx.MockTransport(answer))
    for content in (None, {"text": "é \ud83d"}):
        if code in (200, 204):
            assert own.send("http://server/x", content) == b"its words"
            continue
        kind = client.Passing if code in (408, 425, 429, 500, 502, 503, 504) else client.Refused
        with pytest.raises(kind, match=f"HTTP {code}: its words"):
            own.send("http://server/x", content)
    assert seen == [("GET", b""), ("POST", json.dumps({"text": "é \ud83d"}).encode())]


@pytest.mark.parametrize("url", ["localhost:8000/x", "ftp://localhost/x"])
def test_what_is_no_address_is_not_tried_again(url):
    with pytest.raises(client.Refused) as refused:
        client.Client(timeout=1.0).send(url)
    assert refused.value.code is None


def test_waits_double_up_to_the_longest(monkeypatch):
    waited = []
    monkeypatch.setattr(client.time, "sleep", waited.append)

    def fail():
        raise client.Passing("busy")

    with pytest.raises(client.Passing, match="busy"):
        client.again(fail, tries=8, first_wait=0.5)
    assert waited == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]


def test_calls_tools_and_options_are_sent_as_openai_spells_them(spec):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "é"]}}}
    answer = [
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0.5},
        {"role": "tool", "content": "4", "tool_call_id": "a"},
        {"role": "assistant", "content": "b"},
    ]
    given = {"tools": [{"type": "function", "function": {"name": "f"}}], "enable_thinking": False}
    load_scorer(spec).score([Asked([{"role": "user", "content": "a"}], given)], [answer])
    (body,) = Stub.bodies
    sent = {**call, "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
    assert body["messages"][1:] == [{"role": "assistant", "content": "", "tool_calls": [sent]}, *answer[1:]]
    assert body["chat_template_kwargs"] == given
