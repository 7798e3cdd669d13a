"""A real `vllm serve` behind the engine of servers: both ways of new weights, and the completions of a local engine."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from align.errors import UserError
from align.export.vllm_start import environment
from align.rollout.agreement import check_agreement
from align.rollout.engine import Sampling
from align.rollout.process import EngineProcess
from align.rollout.server import NEUTRAL, VllmServers
from align.rollout.vllm_arguments import VllmArguments
from align.rollout.weights import write_weights

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SAMPLING = Sampling(completions=3, max_tokens=12, seed=4, temperature=0.7, stop_ids=(2,))
PROMPTS = [[5, 6, 7], [9], [8, 3, 4, 4]]
FLAGS = {
    "dtype": "float32",
    "max-model-len": 256,
    "kv-cache-memory-bytes": 1 << 24,
    "block-size": 32,
    "max-num-batched-tokens": 4096,
    "max-lora-rank": 8,
    "generation-config": "vllm",
    "logprobs-mode": "processed_logprobs",
    "max-logprobs": 1,
}
SWITCHES = ("--enforce-eager", "--no-enable-chunked-prefill", "--enable-lora")


@contextmanager
def serving(folder: Path, log: Path, flags: dict):
    """The address of a server that takes adapters and merged weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *given, *SWITCHES],
            env=os.environ | environment({}) | allowed,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 600
        while not answers(address):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # the front process alone would leave its engine running


@pytest.fixture(scope="module")
def url(untied, tmp_path_factory):
    with serving(untied, tmp_path_factory.mktemp("server") / "server.log", FLAGS) as address:
        yield address


@pytest.fixture(scope="module")
def expected(untied, tmp_path_factory):
    """What a local engine writes that draws as a server does."""
    arguments = VllmArguments(str(untied), "float32", 256, lora_rank=8, sampler="vllm")
    local = EngineProcess(arguments, timeout=600, log_file=tmp_path_factory.mktemp("local") / "log")
    try:
        return {i: [one.ids for one in drawn] for i, drawn in local.sample(PROMPTS, SAMPLING)}
    finally:
        local.close()


@pytest.fixture(scope="module")
def hostile(untied, tmp_path_factory):
    """The same model with a generation_config.json that vLLM takes over."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(untied, folder)
    settings = {"repetition_penalty": 1.3, "temperature": 0.4, "top_k": 5, "top_p": 0.8, "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_new_tokens": 3} | settings))
    return folder


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def test_a_server_writes_what_a_local_engine_writes(url, expected, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    servers = VllmServers([url])
    assert {i: [one.ids for one in drawn] for i, drawn in servers.sample(PROMPTS, SAMPLING)} == expected
    assert not caplog.records


def test_a_models_generation_config_is_overridden_and_said(hostile, expected, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    flags = {name: value for name, value in FLAGS.items() if name != "generation-config"}
    with serving(hostile, tmp_path / "log", flags) as address:
        servers = VllmServers([address])
        assert {i: [one.ids for one in drawn] for i, drawn in servers.sample(PROMPTS, SAMPLING)} == expected
    [said] = [record.getMessage() for record in caplog.records]
    assert "puts sampling parameters of its own" in said and "--generation-config vllm" in said


def test_a_server_as_it_starts_by_itself_is_refused(hostile, tmp_path):
    flags = {name: value for name, value in FLAGS.items() if name not in ("generation-config", "logprobs-mode")}
    with (
        serving(hostile, tmp_path / "log", flags) as address,
        pytest.raises(UserError, match="--generation-config vllm --logprobs-mode processed_logprobs"),
    ):
        VllmServers([address])


def test_a_request_has_every_parameter_that_a_server_would_fill_in():
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    fields = CompletionRequest.model_fields
    names = list(fields)
    sampling = names[names.index("use_beam_search") : names.index("bad_words") + 1]  # as vLLM's documentation has them
    harmless = {"skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"}  # of the text
    must = {name for name in sampling if fields[name].default is not None} - harmless
    assert must | CompletionRequest._DEFAULT_SAMPLING_PARAMS.default.keys() <= NEUTRAL.keys()


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_new_weights_over_http(kind, url, untied, tmp_path, trained):
    servers = VllmServers([url])
    for version in (1, 2):
        policy = trained(untied, tmp_path / str(version), version)
        list(servers.sample(PROMPTS, SAMPLING))
        folder = tmp_path / str(version)
        servers.load(write_weights(folder, tmp_path / kind, kind=kind, version=version, dtype="float32"))
        assert check_agreement(servers, policy, PROMPTS, SAMPLING, bound=None).max < 1e-4


def test_what_a_server_refuses_is_the_users_to_know(url):
    with pytest.raises(UserError, match="HTTP 4"):
        list(VllmServers([url]).sample([[5] * 400], SAMPLING))
