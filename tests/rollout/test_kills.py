"""An online run whose trainer or engine is killed at random moments ends with the same rows and adapter."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from align.recipe import dump_recipe
from align.rollout.journal import read_lines
from align.rollout.process import STARTS

KILLS = int(os.environ.get("ALIGN_KILLS", "2"))
"""Of each kind; set it higher for a longer trial."""
pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def start(recipe, folder: Path) -> subprocess.Popen:
    path = folder / f"{Path(recipe.output).name}.yaml"
    path.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "align.cli", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children()
        return [child for child in children if "align.rollout.worker" in child.cmdline()]
    except psutil.Error:
        return []


def result(run: Path) -> list:
    rows = [line for i in (1, 2) for line in read_lines(run / f"iterations/00{i}/rows.jsonl")]
    return [(run / "adapter" / "adapter_model.safetensors").read_bytes(), *rows]


def test_killed_at_random_moments(online_recipe, reward, tmp_path):
    sections = {
        "rollout": {"engine": {"name": "vllm", "cache_gib": 0.02}, "reward": reward, "completions": 16},
        "train": {"epochs": 4, "save_steps": 2},
    }
    whole = online_recipe("whole", **sections)
    began = time.monotonic()
    process = start(whole, tmp_path)
    assert process.wait(timeout=1200) == 0, process.stderr.read()
    seconds = time.monotonic() - began
    expected = result(Path(whole.output))
    moments = random.Random()
    hits = {"trainer": 0, "engine": 0}
    for attempt in itertools.count():
        killed = online_recipe(f"killed{attempt}", **sections)
        process = start(killed, tmp_path)
        in_a_row = 0  # of one trainer, which gives an engine up that fails STARTS times without a result
        while min(hits.values()) < KILLS and alive_after(process, moments.uniform(0.02, 0.5) * seconds):
            own = workers(process)
            if own and hits["engine"] <= hits["trainer"] and in_a_row < STARTS - 1:
                own[0].kill()
                hits["engine"] += 1
                in_a_row += 1
            elif hits["trainer"] < KILLS:
                process.send_signal(signal.SIGKILL)
                process.wait()
                assert not psutil.wait_procs(own, timeout=60)[1], "the engine outlived its trainer"
                hits["trainer"] += 1
                process = start(killed, tmp_path)
                in_a_row = 0
        assert process.wait(timeout=1200) == 0, process.stderr.read()
        assert result(Path(killed.output)) == expected
        if min(hits.values()) >= KILLS:
            break
    print(f"killed: {hits}, over {attempt + 1} runs of {seconds:.0f} s")


def alive_after(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it still runs then."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False
