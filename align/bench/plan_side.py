"""One side of `align.bench.plan`, in a process of its own: `python -m align.bench.plan_side SIDE key=value`."""

import contextlib
import ctypes
import gc
import io
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainerCallback

from align.kernels.head import workspace
from align.planning.devices import devices
from align.planning.measure import measured_rate
from align.planning.plan import make_plan
from align.recipe import Recipe, load_recipe
from align.runs.build import loss_of, prepare
from align.training.parts import assemble, read_rows
from align.training.run import open_run

RECIPE = "recipes/dpo.yaml"
TINY = "data/story-policy"


def planned(recipe: Recipe) -> dict[str, Any]:
    """The plan's bytes and the hours of training alone."""
    began = time.monotonic()
    prepared = prepare(recipe)
    plan = make_plan(recipe, prepared.train, prepared.heldout, devices())
    seconds = time.monotonic() - began
    with patch("align.planning.measure.time.monotonic", time.process_time):  # which other programs disturb less
        rate = measured_rate(recipe, prepared, plan)
    hours = plan.operations["training"] / rate / 3600
    return {"bytes": plan.total("one"), "parts": plan.memory["one"], "hours": hours, "seconds": seconds, "rate": rate}


def measured(recipe: Recipe) -> dict[str, Any]:
    """The peak over what was resident before the model is read, and the seconds of the steps without what is between
    them: checkpoints are of a run of two steps a quarter, and of a longer one little.
    """
    torch.set_num_threads(recipe.train.threads or 1)
    _warm_up(recipe)
    loss = loss_of(recipe)
    with open_run(recipe) as (run, arguments):
        rows = read_rows(recipe, run, arguments)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        parts = assemble(recipe, run, arguments, rows, loss)
        clock = _Clock()
        parts.trainer.add_callback(clock)
        parts.trainer.train_from(None, logging_steps=1)
        return {"bytes": _status("VmHWM") - before, "seconds": clock.seconds, "before": before}


class _Clock(TrainerCallback):
    """The processor's seconds from each step's beginning to behind the optimizer's update."""

    def __init__(self) -> None:
        self.seconds = self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += time.process_time() - self.began


def _warm_up(recipe: Recipe) -> None:
    """A step of a small model: what Python and the libraries load for it is theirs, not the run's."""
    policy = recipe.policy.model_copy(update={"model": TINY})
    train = recipe.train.model_copy(update={"steps": 1, "lists_per_step": 1})
    output = f"{recipe.output}-warm"
    tiny = recipe.model_copy(update={"policy": policy, "train": train, "output": output})
    with open_run(tiny) as (run, arguments):
        parts = assemble(tiny, run, arguments, read_rows(tiny, run, arguments), loss_of(tiny))
        parts.trainer.train_from(None, logging_steps=1)
    del parts
    gc.collect()
    workspace.release()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    side = {"planned": planned, "measured": measured}[sys.argv[1]]
    with contextlib.redirect_stdout(io.StringIO()):
        found = side(load_recipe(RECIPE, sys.argv[2:]))
    print(json.dumps(found))
