"""A run on rows, from its recipe to its summary; one that is there already goes on where it stopped."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from align.files import read_json
from align.recipe import Recipe
from align.report import write_report
from align.report.summary import next_steps, print_summary
from align.runs.build import loss_of
from align.runs.memory import in_memory
from align.runs.run_directory import RunDirectory, start_log
from align.training.arguments import training_arguments
from align.training.meter import Meter, sample_scorer
from align.training.parts import assemble, read_rows
from align.training.results import write_results
from align.training.tracking import flat, run_name, set_project

log = logging.getLogger("align")


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, and what summary.json holds."""

    path: Path
    summary: dict[str, Any]


def train_rows(recipe: Recipe, *, measured: Path | None = None, show: bool = True) -> RunResult:
    """Train the recipe's policy on rows; a run that is already in `recipe.output` goes on where it stopped.

    Args:
        measured: what was measured of the same policy on the same held-out lists, where that is known.
        show: print the figures at the end.

    Raises:
        UserError: the recipe, its data or its model cannot work; said before the first step.
    """
    run, arguments = open_run(recipe)
    finished = is_finished(run)
    if finished:
        read_rows(recipe, run, arguments)
    else:
        in_memory(recipe, lambda own: _train(own, run, arguments, measured), goes_on=run.goes_on)
    return conclude(recipe, run, finished=finished, main=arguments.process_index == 0, show=show)


def open_run(recipe: Recipe) -> tuple[RunDirectory, TrainingArguments]:
    """The recipe's run directory, begun or gone on with, and what transformers' Trainer is told.

    Raises:
        UserError: the folder holds another recipe's run, or other files.
    """
    run = RunDirectory(recipe.output)
    if recipe.train.report_to:
        set_project(recipe.train.project)
    arguments = training_arguments(
        recipe.train,
        checkpoints=run.checkpoints,
        run_name=run_name(run.path),
        recipe_values=flat(recipe.model_dump(mode="json"), "recipe"),
    )
    with arguments.main_process_first():
        run.open(recipe)
    start_log(run, main=arguments.process_index == 0)
    for change in run.changes:
        log.info("%s", change)
    return run, arguments


def is_finished(run: RunDirectory) -> bool:
    """Whether all that the recipe asks for was done before."""
    return run.summary.exists() and run.grows_from is None


def conclude(recipe: Recipe, run: RunDirectory, *, finished: bool, main: bool, show: bool = True) -> RunResult:
    """What a run ends with: its page, and its figures on the terminal.

    Args:
        finished: whether it was so before.
        main: whether this process speaks.
        show: print the figures.
    """
    summary = read_json(run.summary)
    if finished and main:
        print(f"finished before; nothing was done; `align report {run.path}` shows its figures")
        print(f"run directory: {run.path}")
    elif main and not show:
        write_report([run.path])
    elif main:
        print_summary(str(run.path), summary, show=recipe.sampling.show)
        print(f"report: {write_report([run.path])}")
        print(next_steps(str(run.path), summary["task"]))
    return RunResult(run.path, summary)


def _train(recipe: Recipe, run: RunDirectory, arguments: TrainingArguments, measured: Path | None) -> None:
    """All stages of a run on rows, in their order."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    set_seed(recipe.train.seed)
    loss, scorer = loss_of(recipe), sample_scorer(recipe)
    rows = read_rows(recipe, run, arguments)
    parts = assemble(recipe, run, arguments, rows, loss)
    trainer, meter = parts.trainer, Meter(parts, scorer)
    before = meter.before(measured)
    trainer.train_from(run.last_checkpoint(), logging_steps=recipe.train.logging_steps, before=before.all_metrics())
    if recipe.train.keep_best and run.best.exists():
        parts.policy.load_state(run.best)
    after = meter.measure("after")
    if trainer.is_world_process_zero():
        write_results(parts, meter, before, after)
    trainer.accelerator.wait_for_everyone()
