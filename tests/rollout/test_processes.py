"""Two processes do what one does, through the command that a user would type."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from align.recipe import dump_recipe
from align.rollout.journal import read_lines
from align.training.train import train

DIGITS = {"sampled_logprobs", "raw_logprobs", "entropies", "rewards"}
"""Fields of a row that gradients summed in another order move in their last digits."""


def wait_for(found: Callable[[], Any], two: Any) -> Any:
    while not (what := found()):
        assert two.process.poll() is None, two.said()
        time.sleep(0.05)
    return what


def other_end(pipe: Path) -> int | None:
    """The end of a named pipe that is written to, once somebody reads it: held there until this end is closed."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def kill_all(process: subprocess.Popen) -> None:
    """As a machine that stops: the launcher's children would outlive it."""
    launcher = psutil.Process(process.pid)
    killed = [launcher, *launcher.children(recursive=True)]
    for one in killed:
        one.kill()
    psutil.wait_procs(killed, timeout=60)


def numbers(rows: list, field: str) -> list[float]:
    lists = [row[field] for row in rows]
    return [x for values in lists for one in values for x in (one if isinstance(one, list) else [one])]


def files(run: Path) -> set[str]:
    """Less those that are one of each process, or named by their content."""
    paths = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {path for path in paths if "rng_state" not in path and not path.startswith("weights/")}


@pytest.mark.slow
def test_two_gloo_processes_equal_one(online_recipe, reward, start_two, tmp_path):
    """Killed between sampling and scoring, while the second of them waits for the first, and started again."""
    one = train(online_recipe("one", rollout={"reward": reward}))
    recipe = online_recipe("two", rollout={"reward": reward})
    two, path = Path(recipe.output), tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    running = start_two("train", str(path))
    wait_for((two / "recipe.yaml").exists, running)
    pipe = two / "iterations/002/rows.jsonl.partial"  # in place of what an earlier start would have scored
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    end = wait_for(lambda: other_end(pipe), running)
    kill_all(running.process)
    os.close(end)
    pipe.unlink()
    assert (two / "iterations/002/sampled.jsonl").exists() and not (two / "summary.json").exists()
    start_two("train", str(path)).finish()
    for number in (1, 2):
        own, ours = (list(read_lines(run / f"iterations/00{number}/rows.jsonl")) for run in (one.path, two))
        kept = [[{name: row[name] for name in row.keys() - DIGITS} for row in rows] for rows in (own, ours)]
        assert kept[0] == kept[1]
        for field in DIGITS & own[0].keys():
            assert numbers(ours, field) == pytest.approx(numbers(own, field), abs=1e-5, rel=1e-5), field
    for name, tensor in load_file(one.path / "adapter/adapter_model.safetensors").items():
        assert_close(load_file(two / "adapter/adapter_model.safetensors")[name], tensor, rtol=1e-3, atol=1e-5)
    assert files(two) == files(one.path)
    log = (two / "events.log").read_text()
    assert log.count("iteration 1 of 2") == 1 and log.count("iteration 2 of 2") == 2


WAIT = """
import sys, torch
from align.recipe import load_recipe
from align.runs.run_directory import RunDirectory
from align.training.arguments import training_arguments
from align.types import LONGEST_WAIT
recipe = load_recipe(sys.argv[1])
training_arguments(recipe.train, checkpoints=RunDirectory(recipe.output).checkpoints, run_name="wait")
backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
assert backend.options._timeout == LONGEST_WAIT, backend.options._timeout
"""


@pytest.mark.slow
def test_a_process_waits_longer_than_torch_would_let_it(online_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(online_recipe()))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", WAIT, str(path)]
    done = subprocess.run(command, env=os.environ | alone | address, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
