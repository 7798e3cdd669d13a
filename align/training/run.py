"""A run on rows, from its recipe to its summary; one that is there already goes on where it stopped."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from transformers import TrainingArguments, set_seed

from align.files import read_object
from align.model.given import in_place_of
from align.planning.check import refuse_unfit
from align.recipe import Recipe
from align.report.summary import next_steps, print_summary
from align.report.write import write_report
from align.runs.build import loss_of
from align.runs.log import start_log
from align.runs.memory import in_memory
from align.runs.run_directory import RunDirectory
from align.runs.told import told_by_main
from align.training.arguments import training_arguments
from align.training.given import Given
from align.training.hooks import load_callbacks
from align.training.last_words import REPORT
from align.training.meter import Meter, sample_scorer
from align.training.optimizers import check_optimizer
from align.training.parts import assemble, read_rows
from align.training.result import RunResult
from align.training.results import save_adapter, write_results
from align.training.room import check_room
from align.training.schedules import check_schedule
from align.training.strategies import check_strategy, strategy_of
from align.training.tracking import flat, run_name, set_names
from align.training.zero import whole_weights

log = logging.getLogger("align")


def train_rows(
    recipe: Recipe,
    *,
    measured: Path | None = None,
    show: bool = True,
    given: Given = Given(),  # noqa: B008, frozen
) -> RunResult:
    """Train the recipe's policy on rows; a run that is already in `recipe.output` goes on where it stopped.

    Args:
        measured: what was measured of the same policy on the same held-out lists, where that is known.
        show: print the figures at the end.
        given: objects of the caller's own.

    Raises:
        UserError: the recipe, its data or its model cannot work; said before the first step.
    """
    named = load_callbacks(recipe.train.callbacks)
    given = replace(given, callbacks=(*named, *given.callbacks))
    with open_run(recipe, given) as (run, arguments), in_place_of(given.folder, given.model):
        finished = is_finished(run)
        if finished:
            read_rows(recipe, run, arguments, given)
        else:
            in_memory(recipe, lambda own: _train(own, recipe, run, arguments, measured, given), goes_on=run.goes_on)
        return conclude(recipe, run, finished=finished, main=arguments.process_index == 0, show=show)


@contextmanager
def open_run(
    recipe: Recipe,
    given: Given = Given(),  # noqa: B008, frozen
) -> Iterator[tuple[RunDirectory, TrainingArguments]]:
    """The recipe's run directory, begun or gone on with, and what transformers' Trainer is told.

    Until the end of the context no other process may write the directory.

    Raises:
        UserError: the folder holds another recipe's run, or other files, or another process works there.
    """
    run = RunDirectory(recipe.output)
    if recipe.train.report_to:
        set_names(recipe.train.project, run_name(run.path))
    arguments = training_arguments(
        recipe.train,
        checkpoints=run.checkpoints,
        run_name=run_name(run.path),
        recipe_values=flat(recipe.model_dump(mode="json"), "recipe"),
    )
    if not given.optimizer:
        check_optimizer(recipe.train, arguments)
    check_schedule(recipe.train)
    check_strategy(recipe, loss_of(recipe), strategy_of(arguments))
    main = arguments.process_index == 0
    with run.alone() if main else nullcontext():
        with arguments.main_process_first():
            run.open(recipe)
            if main and given.write:
                given.write(run)
        start_log(run, main=main)
        for change in run.changes:
            log.info("%s", change)
        yield run, arguments


def is_finished(run: RunDirectory) -> bool:
    """Whether all that the recipe asks for was done before, and is as it was written; the main process says what is
    not, which the run then makes again."""
    if not run.summary.exists() or run.grows_from is not None:
        return False
    problem = told_by_main(run.digests.problem)
    if problem:
        log.warning("%s; the run is ended anew", problem)
        told_by_main(run.reopen)
    return not problem


def conclude(recipe: Recipe, run: RunDirectory, *, finished: bool, main: bool, show: bool = True) -> RunResult:
    """What a run ends with: its page, and its figures on the terminal.

    Args:
        finished: whether it was so before.
        main: whether this process speaks.
        show: print the figures.
    """
    summary = read_object(run.summary)
    if finished and main and not _has_page(run):
        write_report([run.path])
    if finished and main and show:
        print(f"finished before; nothing was done; `align report {run.path}` shows its figures")
        print(f"run directory: {run.path}")
    elif main and not finished and not show:
        write_report([run.path])
    elif main and not finished:
        print_summary(str(run.path), summary, show=recipe.sampling.show)
        print(f"report: {write_report([run.path])}")
        to: Literal["peft", "transformers"] = "peft" if recipe.policy.adapter.is_offset() else "transformers"
        print(next_steps(str(run.path), summary["task"], to=to))
    return RunResult(run.path, summary)


def _has_page(run: RunDirectory) -> bool:
    """Whether a finished run's page was written after its figures: a kill between the two leaves none, or an older."""
    page = run.path / REPORT
    return page.exists() and page.stat().st_mtime_ns >= run.summary.stat().st_mtime_ns


def _train(
    recipe: Recipe,
    asked: Recipe,
    run: RunDirectory,
    arguments: TrainingArguments,
    measured: Path | None,
    given: Given,
) -> None:
    """All stages of a run on rows, in their order.

    Args:
        asked: the recipe as it was given, where `train.tokens_per_batch` may be `auto`.
        given: objects of the caller's own.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    set_seed(recipe.train.seed)
    loss, scorer = loss_of(recipe), given.scorer or sample_scorer(recipe)
    refuse_unfit(asked, arguments)
    rows = read_rows(recipe, run, arguments, given)
    refuse_unfit(asked, arguments, (rows.rated or rows.prepared).train)
    parts = assemble(recipe, run, arguments, rows, loss, given)
    check_room(recipe, run, parts.trainer)
    trainer, meter = parts.trainer, Meter(parts, scorer)
    before = meter.before(measured)
    checkpoint = told_by_main(run.last_checkpoint)
    trainer.train_from(checkpoint, logging_steps=recipe.train.logging_steps, before=before.all_metrics())
    if best := told_by_main(run.best_state):
        with whole_weights(trainer.scorer, changes=True):
            parts.policy.load_state(best)
    after = meter.measure("after")
    with whole_weights(trainer.scorer):
        save_adapter(run, parts.policy)
        if trainer.is_world_process_zero():
            write_results(parts, meter, before, after)
    trainer.accelerator.wait_for_everyone()
