"""A run that is killed with SIGKILL, anywhere from its first import to its last write, ends with the same adapter."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.recipe import dump_recipe

KILLS = int(os.environ.get("ALIGN_KILLS", "1"))
"""Set it higher for a longer trial."""


def start(recipe, folder: Path) -> subprocess.Popen:
    path = folder / f"{Path(recipe.output).name}.yaml"
    path.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "align.cli", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_random_moments(make_recipe, tmp_path):
    sections = {
        "policy": {"adapter": {"name": "lora", "rank": 4, "dropout": 0.1}},
        "train": {"epochs": 15, "save_steps": 3, "eval_steps": 10},
    }
    whole = make_recipe("whole", **sections)
    began = time.monotonic()
    process = start(whole, tmp_path)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    seconds = time.monotonic() - began
    killed = make_recipe("killed", **sections)
    moments = random.Random()
    interrupted = finished = 0
    while interrupted < KILLS:
        began = time.monotonic()
        process = start(killed, tmp_path)
        try:
            process.wait(timeout=moments.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            interrupted += 1
        else:  # the machine has become faster: a new run is killed sooner
            finished += 1
            seconds = min(seconds, time.monotonic() - began)
            shutil.rmtree(killed.output)
    print(f"{interrupted} kills, the run finished {finished} times between them")
    process = start(killed, tmp_path)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    files = [Path(recipe.output) / "adapter" / "adapter_model.safetensors" for recipe in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
