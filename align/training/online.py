"""Online training: sample, score, train on what was sampled, and again. Each training is an ordinary run on rows."""

import json
import logging
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from align.data import Row, read_source
from align.errors import UserError
from align.evaluate.sampling import row_seed
from align.files import read_object, write_json
from align.model.adapters import Full, Lora
from align.recipe import Recipe, SourceSection
from align.report.summary import ROWS, figure
from align.rollout.engines import check_engine, rests
from align.rollout.prompts import PromptSet, describe_prompts, read_prompts
from align.rollout.sample import Sampler, Stages, describe, policy_version, score
from align.runs.log import start_log
from align.runs.record import Part, hold_to_record, record_rows
from align.runs.run_directory import RunDirectory
from align.runs.told import told_by_main
from align.training.given import Given
from align.training.result import RunResult
from align.training.run import conclude, is_finished, open_run, train_rows

log = logging.getLogger("align")

SHORT = ("ndcg", "best_logprob_change", "sample_reward")
"""Of the held-out figures, those that the line after an iteration has."""


def train_online(recipe: Recipe, given: Given, *, show: bool = True) -> RunResult:
    """Train in iterations of sampling and training; a run that is already in `recipe.output` goes on.

    Args:
        given: objects of the caller's own, but no model; the same in every iteration.
        show: print the figures at the end.

    Raises:
        UserError: something in the recipe cannot work.
    """
    check_online(recipe)
    with open_run(recipe, given) as (run, arguments):
        finished = is_finished(run)
        _iterate(recipe, run, replace(given, write=None))
        return conclude(recipe, run, finished=finished, main=arguments.process_index == 0, show=show)


def _iterate(recipe: Recipe, run: RunDirectory, given: Given) -> None:
    """Run all iterations of the recipe's `online` section, or those that are left; write the run's summary.

    Nothing is done where all are finished, but that the prompts and the held-out rows are those of then is checked.

    Iteration i keeps its files in `iterations/00i`: sampled.jsonl, rows.jsonl (with rewards), stages.json (figures),
    and train/, a run directory on those rows.

    Raises:
        UserError: something in the recipe cannot work.
    """
    assert recipe.online is not None
    state = PartialState()
    main = state.is_main_process  # which samples and scores alone, and writes all files
    prompts = read_prompts(recipe)
    hold_to_record(run, recipe, _parts(recipe, prompts), functions=given.digests, main=main)
    if run.grows_from and main:
        run.grow(recipe, None)
    elif run.summary.exists():
        return
    log.info("%s", describe_prompts(prompts))
    sampler = Sampler(recipe, run.path)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    try:
        for iteration in range(1, recipe.online.iterations + 1):
            if main:
                _sample_and_score(recipe, run, iteration, prompts, sampler)
                if rests(recipe) != "resident":
                    sampler.rest(stop=rests(recipe) == "stopped")
            state.wait_for_everyone()
            _train_iteration(recipe, run, iteration, given, main=main)
    finally:
        sampler.close()
    if main:
        _finish(recipe, run)
    state.wait_for_everyone()


def _parts(recipe: Recipe, prompts: PromptSet) -> dict[str, Part]:
    """What is sampled, and what every iteration is measured on, as digests."""
    rows: list[Row] = []
    for source in recipe.data.eval_sources:
        rows += read_source(source.path, **source.reading, limit=recipe.data.limit).rows
    return {"train": record_rows(prompts.rows), "heldout": record_rows(rows)}


def iteration_folder(run: RunDirectory, iteration: int) -> Path:
    """Where an iteration keeps its files; the first is 1."""
    return run.path / "iterations" / f"{iteration:03d}"


def chosen_prompts(prompts: PromptSet, wanted: int | None, iteration: int, seed: int) -> PromptSet:
    """The prompts of an iteration: the next `wanted` of all turns one after the other, or one whole turn."""
    turns = _turns([row.weight for row in prompts.rows], seed)
    if wanted is None or wanted >= len(prompts.rows):
        return prompts.choose(sorted(next(islice(turns, iteration - 1, None))))
    endless = chain.from_iterable(turns)
    return prompts.choose(list(dict.fromkeys(islice(endless, (iteration - 1) * wanted, iteration * wanted))))


def _turns(weights: list[float], seed: int) -> Iterator[list[int]]:
    """Prompts in an order of each turn's own: those of the largest weight in every turn, others in proportion."""
    shares = [weight / max(weights) for weight in weights]
    first = random.Random(f"{seed} shares")
    due = [first.random() for _ in shares]  # a prompt's turn comes when this reaches 1
    for turn in count():
        due = [have % 1 + share for have, share in zip(due, shares, strict=True)]
        taken = [place for place, have in enumerate(due) if have >= 1]
        yield random.Random(f"{seed} {turn}").sample(taken, len(taken))


def check_online(recipe: Recipe) -> None:
    """Refuse, before there is a run directory, an engine that is not there or a reference that an adapter cannot have.

    Raises:
        UserError: says what to set instead.
    """
    check_engine(recipe)
    assert recipe.online is not None
    wanted, adapter = recipe.online.reference, recipe.policy.adapter
    if wanted not in adapter.references:
        raise UserError(f"online.reference: {wanted} does not go with the adapter {adapter.name}; use initial, or lora")


def iteration_recipe(recipe: Recipe, run: RunDirectory, iteration: int) -> Recipe:
    """The recipe of an iteration's training: the same, on the rows sampled lately, from where the last one ended."""
    assert recipe.online is not None
    first = max(1, iteration - recipe.online.replay)
    rows = [iteration_folder(run, i) / "rows.jsonl" for i in range(first, iteration + 1)]
    data = recipe.data.model_copy(
        update={"sources": tuple(SourceSection(path=str(path)) for path in rows), "limit": None}
    )
    policy = recipe.policy.model_copy(update=_start(recipe, run, iteration))
    own = {"online": None, "data": data, "policy": policy, "output": str(iteration_folder(run, iteration) / "train")}
    return recipe.model_copy(update={**own, "sampling": recipe.sampling.model_copy(update={"show": 0})})


def _start(recipe: Recipe, run: RunDirectory, iteration: int) -> dict[str, Any]:
    """What of the policy section is different in an iteration: where the policy starts, and its reference."""
    assert recipe.online is not None
    if iteration == 1:
        return {}
    last = iteration_folder(run, iteration - 1) / "train"
    every = {"initial": iteration, "previous": 1, "moving": recipe.online.reference_every}[recipe.online.reference]
    reference = (iteration - 1) // every * every  # the iteration whose result is the reference; 0 for the start
    if reference == 0:
        return {"start_run": str(last)}
    trained = str(iteration_folder(run, reference) / "train" / "adapter")
    if isinstance(recipe.policy.adapter, Full):
        return {"model": trained, "revision": None, "start_run": None}
    return {"adapter": Lora(), "start_adapter": trained, "start_run": str(last)}


def _sample_and_score(recipe: Recipe, run: RunDirectory, iteration: int, prompts: PromptSet, sampler: Sampler) -> None:
    assert recipe.online is not None
    folder = iteration_folder(run, iteration)
    stages = Stages(folder)
    stages.check()
    if "score" in stages.read():
        return
    log.info("iteration %d of %d", iteration, recipe.online.iterations)
    seed = recipe.train.seed
    trained = iteration_folder(run, iteration - 1) / "train" if iteration > 1 else None
    figures = stages.do(
        "sample",
        lambda: sampler.sample(
            folder,
            chosen_prompts(prompts, recipe.online.prompts, iteration, seed),  # type: ignore[union-attr]
            seed=row_seed(seed, [], iteration),
            trained=trained,
            version=_version(recipe, run, iteration),
        ),
    )
    figures |= stages.do("score", lambda: score(recipe, folder))
    log.info("%s", describe(figures))


def _version(recipe: Recipe, run: RunDirectory, iteration: int) -> int:
    """Optimizer steps before an iteration."""
    earlier = (RunDirectory(iteration_folder(run, i) / "train") for i in range(1, iteration))
    return policy_version(recipe.policy.start_run) + sum(read_object(r.summary, "steps")["steps"] for r in earlier)


def _train_iteration(recipe: Recipe, run: RunDirectory, iteration: int, given: Given, *, main: bool) -> None:
    own = iteration_recipe(recipe, run, iteration)
    given = replace(given, hooks=replace(given.hooks, iteration=iteration))
    began = time.monotonic()
    there = RunDirectory(own.output)
    finished = told_by_main(lambda: there.summary.exists() and not there.digests.problem())
    measured = _measured(recipe, run, iteration)
    result = train_rows(own, measured=measured, show=False, given=given) if not finished else None
    start_log(run, main=main)  # which the training has turned to its own folder
    if result and main:
        stages = Stages(iteration_folder(run, iteration))
        done = stages.read() | {"train": {"seconds": time.monotonic() - began}}
        write_json(stages.path, done)
        log.info("iteration %d: %s", iteration, _in_short(result.summary))


def _measured(recipe: Recipe, run: RunDirectory, iteration: int) -> Path | None:
    """What the last iteration measured in its end, if that is what this one would measure first: the same policy, on
    the same lists, against the same reference."""
    if iteration == 1 or not recipe.data.eval_sources:
        return None
    reference, before = ({**_start(recipe, run, i), "start_run": None} for i in (iteration, iteration - 1))
    after = RunDirectory(iteration_folder(run, iteration - 1) / "train").after
    return after if reference == before and after.exists() else None


def _in_short(summary: dict[str, Any]) -> str:
    before, after = summary["eval_before"], summary["eval_after"]
    shown = [(key, label, pattern) for key, label, pattern in ROWS if key in after and key in SHORT]
    return "; ".join(f"{label} {figure(p, before[key])} -> {figure(p, after[key])}" for key, label, p in shown)


def _finish(recipe: Recipe, run: RunDirectory) -> None:
    """The run's own adapter, metrics and summary, from those of its iterations."""
    assert recipe.online is not None
    folders = [iteration_folder(run, i) for i in range(1, recipe.online.iterations + 1)]
    runs = [RunDirectory(folder / "train") for folder in folders]
    summaries = [read_object(one.summary, "steps") for one in runs]
    with run.replaced_folder(run.adapter) as temporary:
        shutil.copytree(runs[-1].adapter, temporary, dirs_exist_ok=True)
    lines, steps, iterations = [], 0, []
    for number, (folder, one, summary) in enumerate(zip(folders, runs, summaries, strict=True), start=1):
        for line in one.read_metrics():
            lines.append({**line, "iteration": number, "step": steps + line["step"]})
        iterations.append(_iteration_figures(number, Stages(folder).read(), summary))
        steps += summary["steps"]
    run.write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    seconds = sum(summary["train_seconds"] for summary in summaries)
    tokens = sum(summary["tokens_per_second"] * summary["train_seconds"] for summary in summaries)
    whole = summaries[-1] | {
        "steps": steps,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "eval_before": summaries[0]["eval_before"],
        "samples": _spanning(summaries[0]["samples"], summaries[-1]["samples"]),
        "iterations": iterations,
    }
    run.write_json(run.summary, whole)
    shutil.rmtree(run.path / "weights", ignore_errors=True)  # the adapter has them


def _iteration_figures(number: int, stages: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    sample = stages["sample"]
    seconds = {
        "sync": sample.get("sync_seconds"),
        "sample": sample["seconds"] - sample.get("sync_seconds", 0.0),
        "score": stages["score"]["seconds"],
        "train": summary["train_seconds"],
        # Loading, tokenising, the reference's log-probabilities, and measuring before and after.
        "evaluate": max(0.0, stages.get("train", {}).get("seconds", 0.0) - summary["train_seconds"]),
    }
    return {
        "iteration": number,
        "policy_version": sample["policy_version"],
        "sampled_reward": stages["score"]["mean_reward"],
        "eval_after": summary["eval_after"],
        "reward_before": summary["eval_before"].get("sample_reward"),
        "reward_after": summary["eval_after"].get("sample_reward"),
        "lists": summary["data"]["train_lists"],
        "refused": summary["data"]["refused"],
        "steps": summary["steps"],
        "seconds": seconds,
        "tokens_per_second": sample.get("tokens_per_second"),
        "agreement": sample.get("agreement"),
        "entropy": sample.get("entropy"),
    }


def _spanning(first: list[dict[str, Any]], last: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples before the first iteration and after the last, of the prompts that both have."""
    before = {row["prompt"]: {name: value for name, value in row.items() if "before" in name} for row in first}
    return [row | before[row["prompt"]] for row in last if row["prompt"] in before]
