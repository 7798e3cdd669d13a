"""Trains the recipes that it is given, one after another, in the processes that a launcher has started.

A model of a few thousand parameters trains faster than torch is loaded, so that tests start processes once for many.
`recipe.yaml@2` trains a finished run again from its checkpoint of step 2 on, as if it had been killed soon after.
"""

import shutil
import sys

from accelerate import PartialState

from align.recipe import load_recipe
from align.runs.checkpoints import numbered, step_of
from align.runs.run_directory import RunDirectory
from align.training.processes import leave
from align.training.train import train


def stop_after(run: RunDirectory, step: int) -> None:
    """Leave of a run what a kill between this step and its next checkpoint would."""
    kept, *later = (c for c in numbered(run.checkpoints) if step_of(c) >= step)
    assert kept.name == f"checkpoint-{step}" and later, "a run with a checkpoint there, and more to do"
    for newer in (*later, run.adapter):
        shutil.rmtree(newer)
    run.summary.unlink()


def train_again(path: str, step: int) -> None:
    recipe = load_recipe(path)
    state = PartialState()
    if state.is_main_process:
        stop_after(RunDirectory(recipe.output), step)
    state.wait_for_everyone()
    train(recipe)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path, _, step = argument.partition("@")
        train_again(path, int(step)) if step else train(load_recipe(path))
    leave()
