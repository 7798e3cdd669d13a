"""A real `vllm serve` behind the engine of servers: both ways of new weights, and the completions of a local engine."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from align.errors import UserError
from align.rollout.agreement import check_agreement
from align.rollout.engine import Sampling
from align.rollout.process import EngineProcess
from align.rollout.server import VllmServers
from align.rollout.vllm_arguments import VllmArguments, environment
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
    "logprobs-mode": "processed_logprobs",
    "max-logprobs": 1,
}
SWITCHES = ("--enforce-eager", "--no-enable-chunked-prefill", "--enable-lora")


@pytest.fixture(scope="module")
def url(untied, tmp_path_factory):
    """Of a server that takes adapters and merged weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(untied)]
    flags = [part for name, value in FLAGS.items() for part in (f"--{name}", str(value))]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *flags, *SWITCHES],
            env=os.environ | environment({}) | allowed,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 600
    while not answers(address):
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(1)
    yield address
    os.killpg(server.pid, signal.SIGKILL)  # the front process alone would leave its engine running


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def test_a_server_writes_what_a_local_engine_writes(url, untied, tmp_path):
    local = EngineProcess(
        VllmArguments(str(untied), "float32", 256, lora_rank=8, sampler="vllm"),  # which is what a server draws with
        timeout=600,
        log_file=tmp_path / "log",
    )
    try:
        expected = {i: [one.ids for one in drawn] for i, drawn in local.sample(PROMPTS, SAMPLING)}
    finally:
        local.close()
    servers = VllmServers([url])
    assert {i: [one.ids for one in drawn] for i, drawn in servers.sample(PROMPTS, SAMPLING)} == expected


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
