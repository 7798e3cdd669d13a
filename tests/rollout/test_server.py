"""Served engines against stub servers that speak vLLM's API."""

import json
import logging
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest
from fake_engine import fake_completions

from align.errors import UserError
from align.evaluate.sampling import Sampled, row_seed
from align.rollout import server
from align.rollout.endpoints import Endpoints, Passing
from align.rollout.engine import Sampling, Weights
from align.rollout.server import FLAGS, NEUTRAL, VllmServers

PROMPTS = [[1, 3 + i] for i in range(12)]
SAMPLING = Sampling(completions=3, max_tokens=5, seed=11, temperature=0.7, top_k=9, stop=("w4",), stop_ids=(2,))


class Stub:
    """A server; `fail` says for a path and how often it was asked which HTTP code to answer with."""

    def __init__(self) -> None:
        self.probes: list[dict] = []
        self.base = "base"
        self.forced = 0.0  # log-probability of a token that is the only one allowed
        self.added: dict = {}  # sampling parameters of its own
        self.change = lambda choice: choice
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
        if content.get("ignore_eos"):
            self.probes.append(content)
            return self.send(handler, 200, self.probed(content))
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
        self.send(handler, code, body)

    def probed(self, content):
        """A completion that depends on every sampling parameter."""
        settings = {**server.NEUTRAL, **self.added, **content}
        value = self.forced if "allowed_token_ids" in content else -float(len(str(sorted(settings.items()))))
        return {"choices": [{"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [value]}}]}

    def send(self, handler, code, body):
        data = json.dumps(body).encode()
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def reply(self, path, content):
        if path == "/v1/models":
            return {"data": [{"id": name} for name in [self.base, *self.adapters]]}
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
                "stop_reason": "w4" if one["ended"] else None,
            }
            for k, one in enumerate(drawn)
        ]
        return {"choices": [self.change(choice) for choice in choices[::-1]]}

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
    assert content == NEUTRAL | {
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


class Clock:
    """Time that passes only in sleep."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


def endpoints(urls, prepare, clock, **options):
    settings = {"tries": 5, "first_wait": 1.0, **options}
    return Endpoints(urls, prepare, clock=lambda: clock.now, sleep=clock.sleep, **settings)


def failing(times):
    """A request that fails so often, by server; `asked` says when and where it was sent."""

    def request(url):
        request.asked.append(url)
        if times.get(url, 0) > 0:
            times[url] -= 1
            raise Passing("HTTP 503")
        return url

    request.asked = []
    return request


def test_a_passing_failure_is_waited_out_with_longer_and_longer_waits():
    clock = Clock()
    one = endpoints(["a"], lambda url: None, clock)
    one.everywhere()
    assert one.anywhere(failing({"a": 3})) == "a" and clock.waits == [1.0, 2.0, 4.0]
    with pytest.raises(UserError, match="a failed, the last of 5 attempts at a request: HTTP 503; start it"):
        one.anywhere(failing({"a": 99}))
    assert clock.waits[3:] == [1.0, 2.0, 4.0, 8.0]


def test_a_wait_is_thirty_seconds_at_most_and_none_outlives_all_servers():
    clock = Clock()
    both = endpoints(["a", "b"], lambda url: None, clock, tries=9)
    both.everywhere()
    request = failing({"a": 99, "b": 99})
    for _ in range(2):
        with pytest.raises(UserError, match="a request: HTTP 503"):
            both.anywhere(request)
    with pytest.raises(UserError, match="a does not answer .HTTP 503.; b does not answer"):
        both.anywhere(request)
    assert max(clock.waits) <= 30.0 and request.asked.count("a") == request.asked.count("b") == 9


def test_a_dead_server_is_asked_now_and_then_and_spoken_of_twice(caplog, monkeypatch):
    """Whatever the number of prompts: when it goes, and when it is back."""
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    clock, prepared = Clock(), []
    both = endpoints(["a", "b"], prepared.append, clock)
    both.everywhere()
    request = failing({"a": 4})
    for _ in range(100):
        assert both.anywhere(request) == "b" or request.asked.count("a") > 4
        clock.now += 0.3
    assert request.asked[:10].count("a") <= 3 and request.asked.count("a") > 4
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "a does not answer (HTTP 503); the other servers go on, and it is asked again now and then",
        "a answers again",
    ]
    assert prepared == ["a", "b", *["a"] * 4]  # what comes back may be another process, with other weights


def test_requests_in_flight_when_a_server_dies_count_once():
    calls, together, waits = count(1), threading.Barrier(8), []
    one = Endpoints(["a"], lambda url: None, tries=5, first_wait=0.2, sleep=lambda s: waits.append(s) or time.sleep(s))
    one.everywhere()

    def request(url):
        if next(calls) <= 8:
            together.wait()
            raise Passing("gone")
        return url

    with ThreadPoolExecutor(8) as pool:
        assert [found.result() for found in [pool.submit(one.anywhere, request) for _ in range(8)]] == ["a"] * 8
    assert max(waits) <= 0.2  # eight failures one after the other would be 0.2 + 0.4 + 0.8 ... seconds


def test_the_dead_server_of_a_sampling(stubs, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    servers = engine(stubs, first_wait=0.05)
    servers.load(Weights("adapter", "/run/v1", 1, "v1"))
    stubs[0].fail = lambda path, count: 503
    prompts = [[1, 3 + i] for i in range(100)]
    assert len(dict(servers.sample(prompts, SAMPLING))) == 100
    assert len(caplog.records) == 1
    stubs[0].fail, stubs[0].adapters, stubs[1].slow = lambda path, count: None, [], 0.02
    assert len(dict(servers.sample(prompts, SAMPLING))) == 100
    assert [record.getMessage().split()[-2:] for record in caplog.records[1:]] == [["answers", "again"]]
    assert stubs[0].adapters == ["v1"]  # it came back without


def test_a_server_that_is_dead_at_the_load_gets_the_weights_when_it_is_back(stubs):
    servers = engine(stubs, first_wait=0.05)
    stubs[0].fail = lambda path, count: 503
    servers.load(Weights("merged", "/run/merged-v1", 1, "merged-v1"))
    assert stubs[1].paths()["/collective_rpc"] == 1
    stubs[0].fail = lambda path, count: None
    time.sleep(0.1)
    stubs[0].asked.clear()
    list(servers.sample(PROMPTS, SAMPLING))
    asked = [path for path, _ in stubs[0].asked]
    assert asked.index("/collective_rpc") < asked.index("/reset_prefix_cache") < asked.index("/v1/completions")


def test_log_probabilities_of_another_distribution_are_refused(stubs):
    """vLLM's default: those before penalties, temperature and filters."""
    stubs[1].forced = -3.2
    with pytest.raises(UserError, match=f"{stubs[1].url} are not those that it draws by.*start it with {FLAGS}"):
        engine(stubs)


@pytest.mark.parametrize("name", ["repetition_penalty", "temperature", "top_k", "top_p", "min_p", "presence_penalty"])
def test_what_a_server_adds_is_said_once_and_overridden(stubs, name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    stubs[0].added = {name: 0.123}
    servers = engine(stubs[:1])
    [said] = [record.getMessage() for record in caplog.records]
    assert "puts sampling parameters of its own" in said and FLAGS in said
    list(servers.sample(PROMPTS, SAMPLING))
    assert all(name in content for path, content in stubs[0].asked if path == "/v1/completions")
    caplog.clear()
    engine(stubs[1:])
    assert not caplog.records


def test_completions_that_are_cut_or_ended_otherwise_are_refused(stubs):
    def ids(*own: int) -> dict:
        return {"token_ids": list(own), "logprobs": {"token_logprobs": [-0.5] * len(own)}}

    servers = engine(stubs[:1])
    stubs[0].change = lambda choice: choice | {"finish_reason": "length"} | ids(7, 7)
    with pytest.raises(UserError, match="cuts completions at 2 of 5 tokens; .*--max-model-len"):
        list(servers.sample(PROMPTS[:1], SAMPLING))
    stubs[0].change = lambda choice: choice | {"finish_reason": "stop", "stop_reason": 7} | ids(8, 7)
    with pytest.raises(UserError, match="ends completions at token 7, which ends none"):
        list(servers.sample(PROMPTS[:1], SAMPLING))
    stubs[0].change = lambda choice: choice | {"finish_reason": "stop", "stop_reason": None} | ids(8, 2)
    assert all(one.ended for one in dict(servers.sample(PROMPTS[:1], SAMPLING))[0])
    stubs[0].change = lambda choice: choice | {"finish_reason": "abort"}
    with pytest.raises(UserError, match="ended by `abort`"):
        list(servers.sample(PROMPTS[:1], SAMPLING))


def test_servers_of_different_models_are_refused(stubs):
    stubs[1].base = "other"
    with pytest.raises(UserError, match=f"{stubs[1].url} serves other, not base"):
        engine(stubs)


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
