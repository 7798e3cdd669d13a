"""Several processes do what one does, started as a user would start them."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from equal_runs import SETTINGS, TRAIN, assert_best_is_not_last, assert_equal_runs
from train_each import train_again

from align.errors import UserError
from align.training.processes import lost_process
from align.training.train import train

ROOT = Path(__file__).parents[2]
AMONG_THREE = ("weighted", "parts", "parts_reward")
GOES_ON = ("lambda", "full", "more")


def assert_measures_waiting(run: Path) -> None:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    shares = [line["rank_wait_share"] for line in lines if "grad_norm" in line]
    assert len(shares) >= 3 and all(0 <= share < 1 for share in shares)


@pytest.mark.slow
def test_gloo_processes_equal_one(make_setting, start_each, tmp_path):
    """Two from the begin, and runs that go on in another number of them: 1 -> 2, 2 -> 2, 2 -> 1. The last run
    loses one of its processes."""
    one = {name: make_setting(f"one_{name}", name) for name in SETTINGS}
    ones = {name: shutil.copytree(train(one[name][0]).path, tmp_path / f"kept_{name}") for name in GOES_ON}
    two = {name: make_setting(f"two_{name}", name) for name in SETTINGS}
    again = [f"{made[name][1]}@2" for made in (two, one) for name in GOES_ON]
    killed, path = make_setting("killed", "lambda", train=TRAIN | {"epochs": 400})
    running = start_each("train_each", *(path for _, path in two.values()), *again, path)
    ones |= {name: train(recipe).path for name, (recipe, _) in one.items() if name not in GOES_ON}
    assert_a_killed_process_ends_all(running, Path(killed.output) / "metrics.jsonl")
    for name, (recipe, _) in (*two.items(), *((name, one[name]) for name in GOES_ON)):  # of GOES_ON: 2 -> 2
        assert_equal_runs(ones[name], Path(recipe.output))
    assert_measures_waiting(Path(two["lambda"][0].output))
    assert_best_is_not_last(ones["best"])
    train_again(two[GOES_ON[0]][1], 2)
    assert_equal_runs(ones[GOES_ON[0]], Path(two[GOES_ON[0]][0].output))


def test_three_gloo_processes_equal_one(make_setting, start_each):
    """From the begin, and runs of two processes that go on as three."""
    ones = {name: train(make_setting(f"one_{name}", name)[0]).path for name in {*AMONG_THREE, *GOES_ON[1:]}}
    begun = {name: make_setting(f"two_{name}", name) for name in GOES_ON[1:]}
    start_each("train_each", *(path for _, path in begun.values())).finish()
    three = {name: make_setting(f"three_{name}", name) for name in AMONG_THREE}
    again = [f"{path}@2" for _, path in begun.values()]
    start_each("train_each", *(path for _, path in three.values()), *again, processes=3).finish()
    for name, (recipe, _) in (*three.items(), *begun.items()):
        assert_equal_runs(ones[name], Path(recipe.output))


def assert_a_killed_process_ends_all(running, metrics: Path) -> None:
    """In the middle of a run, as by a system that lacks memory: the launcher says which and why; nothing is left."""
    while not metrics.exists() or metrics.stat().st_size < 100:
        assert running.process.poll() is None, running.said()
        time.sleep(0.1)
    processes = psutil.Process(running.process.pid).children(recursive=True)
    (second,) = (one for one in processes if one.environ().get("RANK") == "1")
    second.kill()
    assert running.process.wait(timeout=120) == 1
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    root_cause = running.said().rpartition("Root Cause")[2]
    assert "rank      : 1 " in root_cause and "SIGKILL" in root_cause


@pytest.mark.parametrize("config", sorted((ROOT / "recipes/accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_of_accelerate_starts_what_it_says(config):
    """As `accelerate launch` reads it: several processes, and the recipe's precision."""
    said = yaml.safe_load(config.read_text())
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "-m", "align.cli"])
    read, defaults, _ = _validate_launch_command(arguments)
    assert read.num_processes > 1 and read.mixed_precision == "no"
    kinds = {"multi_gpu": read.multi_gpu, "fsdp": read.use_fsdp, "deepspeed": read.use_deepspeed}
    assert [kind for kind, chosen in kinds.items() if chosen] == [said["distributed_type"].lower()]


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
ASKED = {
    "several processes, and starts one: give it --multi_gpu": LAUNCHED | {"MASTER_ADDR": "127.0.0.1"},
    "SLURM_STEP_NUM_TASKS is 4, and each of these processes would train alone": {"SLURM_STEP_NUM_TASKS": "4"},
    "mixed_precision bfloat16, the recipe's train.precision is float32": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "asks for mixed_precision fp8, which does not train here": {"ACCELERATE_MIXED_PRECISION": "fp8"},
    "asks for gradient_accumulation_steps 4": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    "accelerate's configuration asks for Megatron-LM": LAUNCHED | {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "accelerate's configuration asks for FSDP": LAUNCHED | {"ACCELERATE_USE_FSDP": "true"},
    "DeepSpeed": LAUNCHED | {"ACCELERATE_USE_DEEPSPEED": "true"},
}
"""What is said -> the environment that a launcher gives."""


@pytest.mark.parametrize("said", ASKED)
def test_what_a_launcher_was_asked_for_and_does_not_do_is_said(make_recipe, monkeypatch, said):
    for name, value in ASKED[said].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(said)):
        train(make_recipe(train={"steps": 1}))


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3979. This is typically", True),
        ("[../gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:3979: Connection reset by peer", True),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.27.3", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_process_left_behind_says_why_it_ends(monkeypatch, said, known):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    sentence = lost_process(RuntimeError(said))
    assert (sentence is not None) == known
    assert not known or "process 3 ends because another one has ended" in sentence


ONE_OF_SEVERAL = """
import atexit, sys, torch
from align.cli import main

class TakenDown:
    def __del__(self):
        print("taken down", flush=True)

kept = TakenDown()
atexit.register(lambda: print("handed over; connected:", torch.distributed.is_initialized()))
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
main(["doctor"])
"""


def test_a_command_of_several_processes_ends_with_them_and_at_once(tmp_path):
    """Else gloo may abort one that takes itself down, and the launcher ends one that still writes its report."""
    ended = subprocess.run(
        [sys.executable, "-c", ONE_OF_SEVERAL, tmp_path / "store"], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("handed over; connected: False\n")
