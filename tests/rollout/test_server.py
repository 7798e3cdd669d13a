"""Served engines against stub servers that speak vLLM's API."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fake_engine import fake_completions

from align.errors import UserError
from align.evaluate.sampling import Sampled, row_seed
from align.rollout.engine import Sampling, Weights
from align.rollout.server import VllmServers

PROMPTS = [[1, 3 + i] for i in range(12)]
SAMPLING = Sampling(completions=3, max_tokens=5, seed=11, temperature=0.7, top_k=9, stop=("w4",), stop_ids=(2,))


class Stub:
    """A server; `fail` says for a path and how often it was asked which HTTP code to answer with."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.headers: list[dict] = []
        self.adapters: list[str] = []
        self.fail = lambda path, count: None
        self.slow = 0.0
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                stub.answer(self, {})

            def do_POST(self):
                stub.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, handler, content):
        with self.lock:
            count = sum(path == handler.path for path, _ in self.asked)
            self.asked.append((handler.path, content))
            self.headers.append(dict(handler.headers))
        code = self.fail(handler.path, count)
        if code is None:
            time.sleep(self.slow)
            code, body = 200, self.reply(handler.path, content)
        else:
            body = {"error": "refused on purpose"}
        data = json.dumps(body).encode()
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def reply(self, path, content):
        if path == "/v1/models":
            return {"data": [{"id": name} for name in ["base", *self.adapters]]}
        if path == "/v1/load_lora_adapter":
            self.adapters.append(content["lora_name"])
        if path == "/v1/unload_lora_adapter":
            self.adapters.remove(content["lora_name"])
        if path != "/v1/completions":
            return {}
        drawn = fake_completions(content["prompt"], content["seed"], content["n"], content["max_tokens"])
        choices = [
            {
                "index": k,
                "token_ids": one["ids"],
                "logprobs": {"token_logprobs": one["logprobs"]},
                "finish_reason": "stop" if one["ended"] else "length",
            }
            for k, one in enumerate(drawn)
        ]
        return {"choices": choices[::-1]}

    def paths(self):
        return Counter(path for path, _ in self.asked)


@pytest.fixture
def stubs():
    both = [Stub(), Stub()]
    yield both
    for stub in both:
        stub.http.shutdown()
        stub.http.server_close()


def engine(stubs, **options):
    return VllmServers([stub.url for stub in stubs], **{"concurrency": 2, "tries": 4, "first_wait": 0.01, **options})


def expected():
    return {
        i: [Sampled(**one) for one in fake_completions(prompt, row_seed(11, prompt, 0), 3, 5)]
        for i, prompt in enumerate(PROMPTS)
    }


def test_every_prompt_once_over_all_servers(stubs):
    for stub in stubs:
        stub.slow = 0.02
    found = list(engine(stubs).sample(PROMPTS, SAMPLING))
    assert dict(found) == expected() and len(found) == len(PROMPTS)
    shares = [stub.paths()["/v1/completions"] for stub in stubs]
    assert sum(shares) == len(PROMPTS) and min(shares) >= len(PROMPTS) // 4


def test_prompts_that_are_done_are_not_asked_for(stubs):
    wanted = expected()
    del wanted[0], wanted[2]
    assert dict(engine(stubs).sample(PROMPTS, SAMPLING, done={0, 2})) == wanted
    assert sum(stub.paths()["/v1/completions"] for stub in stubs) == len(wanted)


def test_a_request_says_all_of_the_sampling(stubs):
    list(engine(stubs[:1]).sample(PROMPTS[:1], SAMPLING))
    _, content = stubs[0].asked[-1]
    assert content == {
        "model": "base",
        "prompt": PROMPTS[0],
        "n": 3,
        "seed": row_seed(11, PROMPTS[0], 0),
        "max_tokens": 5,
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 1.0,
        "min_p": 0.0,
        "stop": ["w4"],
        "stop_token_ids": [2],
        "logprobs": 0,
        "return_token_ids": True,
    }


def test_a_server_that_fails_is_worked_around(stubs):
    stubs[0].fail = lambda path, count: 503 if path == "/v1/completions" else None
    assert dict(engine(stubs).sample(PROMPTS, SAMPLING)) == expected()
    assert stubs[1].paths()["/v1/completions"] == len(PROMPTS)


def test_a_server_that_is_gone_is_worked_around(stubs):
    servers = engine(stubs)
    stubs[0].http.shutdown()
    stubs[0].http.server_close()
    assert dict(servers.sample(PROMPTS, SAMPLING)) == expected()


def test_a_passing_failure_is_waited_out_with_longer_and_longer_waits(stubs, monkeypatch):
    waits = []
    monkeypatch.setattr("align.rollout.server.time.sleep", waits.append)
    stubs[0].fail = lambda path, count: 500 if path == "/v1/completions" and count < 3 else None
    assert dict(engine(stubs[:1], first_wait=1.0).sample(PROMPTS[:1], SAMPLING)) == {0: expected()[0]}
    assert [wait for wait in waits if wait] == [1.0, 2.0, 4.0]  # the stub waits too, for no time
    stubs[0].fail = lambda path, count: 500 if path == "/v1/completions" else None
    with pytest.raises(UserError, match="failed 4 times: HTTP 500.*start it"):
        list(engine(stubs[:1]).sample(PROMPTS[:1], SAMPLING))


def test_a_refusal_is_not_repeated(stubs):
    stubs[0].fail = lambda path, count: 400 if path == "/v1/completions" else None
    with pytest.raises(UserError, match="refuses: HTTP 400: .*refused on purpose"):
        list(engine(stubs[:1]).sample(PROMPTS[:1], SAMPLING))
    assert stubs[0].paths()["/v1/completions"] == 1


def test_adapters_follow_one_another_under_their_own_names(stubs):
    servers = engine(stubs)
    for version in (1, 2):
        servers.load(Weights("adapter", f"/run/adapter-v{version}", version, f"adapter-v{version}-{version}c0"))
        assert [stub.adapters for stub in stubs] == [[f"adapter-v{version}-{version}c0"]] * 2
        list(servers.sample(PROMPTS[:1], SAMPLING))
    asked = [stub.asked[-1][1].get("model") for stub in stubs]
    assert "adapter-v2-2c0" in asked
    assert all(stub.paths()["/reset_prefix_cache"] == 2 for stub in stubs)


def test_an_adapter_that_a_server_has_already_is_not_loaded_again(stubs):
    stubs[0].adapters = ["adapter-v1-ab"]
    servers = engine(stubs[:1])
    servers.load(Weights("adapter", "/run/adapter-v1-ab", 1, "adapter-v1-ab"))
    assert "/v1/load_lora_adapter" not in stubs[0].paths() and servers.model == "adapter-v1-ab"


def test_merged_weights_are_reloaded_by_path_and_the_cache_is_reset(stubs):
    servers = engine(stubs)
    servers.load(Weights("merged", "/run/merged-v1", 1, "merged-v1"))
    for stub in stubs:
        told = [(path, content) for path, content in stub.asked if path != "/v1/models"]
        assert told == [
            ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "/run/merged-v1"}}),
            ("/reset_prefix_cache", {}),
        ]
    assert servers.model == "base"


def test_a_server_that_cannot_take_weights_is_told_how_to_start(stubs):
    stubs[0].fail = lambda path, count: 404 if path != "/v1/models" else None
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        engine(stubs[:1]).load(Weights("adapter", "/a", 1, "a"))
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        engine(stubs[:1]).load(Weights("merged", "/a", 1, "a"))
    stubs[0].fail = lambda path, count: 404 if path == "/reset_prefix_cache" else None
    engine(stubs[:1]).load(Weights("adapter", "/a", 1, "a"))  # its cache is keyed by the adapter's name
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        engine(stubs[:1]).load(Weights("merged", "/a", 1, "a"))


def test_the_key_comes_from_the_environment(stubs, monkeypatch):
    with pytest.raises(UserError, match="ALIGN_TEST_KEY"):
        engine(stubs[:1], api_key="ALIGN_TEST_KEY")
    monkeypatch.setenv("ALIGN_TEST_KEY", "secret")
    engine(stubs[:1], api_key="ALIGN_TEST_KEY")
    assert stubs[0].headers[-1]["Authorization"] == "Bearer secret"


def test_no_server_at_all():
    with pytest.raises(UserError, match="does not answer"):
        VllmServers(["http://127.0.0.1:9"], tries=2, first_wait=0.01)
