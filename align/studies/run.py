"""A study from its first run to its table: runs that are there already are read, those that are missing are made."""

import gc
import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from align.errors import UserError
from align.locks import alone
from align.progress import counted, in_time
from align.recipe import Recipe
from align.report.study_page import write_study
from align.report.summary import LOWER_IS_BETTER, SQUARED_ERROR
from align.runs.log import one_of_many
from align.runs.run_directory import RunDirectory
from align.stopping import came
from align.studies.plan import Arm, Plan, plan_study, plan_sweep
from align.studies.show import print_study
from align.studies.statistics import interval, paired
from align.training.train import train

FIGURES = ("sample_reward", "pair_accuracy", "ndcg", "best_logprob_change")
"""What a table shows where the study names none."""
FAILED = 1
"""Exit code of a study in which a run has failed."""

log = logging.getLogger("align")

Record = dict[str, Any]
"""One run: seed, path, and either its held-out figures with steps, seconds and tokens, or the error."""


def study(
    file: str,
    output: str | None = None,
    settings: Sequence[str] = (),
    *,
    trust_remote_code: bool = False,
    allow_code: bool = False,
) -> None:
    """Run the study of a file, or what is left of it; see `plan_study`.

    Raises:
        UserError: something in it cannot work, said before the first run.
        SystemExit: with 1, after all, where a run has failed.
    """
    _conclude(plan_study(file, output, settings, trust_remote_code=trust_remote_code, allow_code=allow_code))


def sweep(
    base: str,
    settings: Sequence[str] = (),
    *,
    vary: Sequence[str],
    seeds: int = 1,
    baseline: str | None = None,
    halving: int | None = None,
    by: str | None = None,
    trust_remote_code: bool = False,
    allow_code: bool = False,
) -> None:
    """Run a recipe over the grid of a command line, or what is left of it; see `plan_sweep`.

    Raises:
        UserError, SystemExit: see `study`.
    """
    options: dict[str, Any] = {"seeds": seeds, "baseline": baseline, "halving": halving, "by": by}
    options |= {"trust_remote_code": trust_remote_code, "allow_code": allow_code}
    _conclude(plan_sweep(base, settings, vary=vary, **options))


def _conclude(plan: Plan) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a study runs in one process; launch `align train` on each of its runs, then `align study`")
    result = execute(plan)
    print_study(plan.path, result)
    if any(arm["failures"] for arm in result["arms"].values()):
        raise SystemExit(FAILED)


def execute(plan: Plan) -> dict[str, Any]:
    """All runs of a study, seed by seed; `study.json`, its plot and its page are written after each.

    Rows are prepared, and the reference reads them, once for all runs for which both give the same: the caches of
    preparations and reference values are under keys of what they depend on. A run that fails is recorded with what it
    said, and tried again by the next call.

    Returns:
        What study.json holds.

    Raises:
        UserError: a run of the study is there already, of another recipe.
    """
    with alone(plan.path, instead="give another folder"):
        _check_begun(plan)
        arms, done, spent = plan.arms, dict[str, tuple[float, list[Record]]](), list[Record]()
        for share in plan.shares:
            for seed in plan.study.seeds:
                for arm in arms:
                    record = _run(plan.recipe(arm, seed, share), seed)
                    runs = done[arm.name][1] if seed != plan.study.seeds[0] else []
                    done[arm.name] = (share, [*runs, record])
                    spent.append(record)
                    _say(arm, record, f"{len(spent)}/{_planned(plan)}", share)
                    result = _result(plan, done, spent)
                    write_study(plan.path, result)
                _check_figures(plan, done)
            arms = _best(plan, arms, done) if share < 1 else arms
    return result


def _check_begun(plan: Plan) -> None:
    """Refuse, before any work, runs that are there of other recipes than those of the study."""
    for share, arm, seed in itertools.product(plan.shares, plan.arms, plan.study.seeds):
        run = RunDirectory(plan.folder(arm, seed, share))
        if run.recipe.exists():
            run.open(plan.recipe(arm, seed, share))


def _check_figures(plan: Plan, done: dict[str, tuple[float, list[Record]]]) -> None:
    """Refuse a figure to show that no arm has.

    Raises:
        UserError: names it, and those that there are.
    """
    known = {key for _, runs in done.values() for key in _by_seed(runs)}
    if known and (unknown := [key for key in plan.study.figures if key not in known]):
        raise UserError(f"figures: no run has `{unknown[0]}`; there are {', '.join(sorted(known))}")


def _run(recipe: Recipe, seed: int) -> Record:
    """One run, or what has ended it."""
    record: Record = {"seed": seed, "path": recipe.output}
    try:
        with one_of_many():
            summary = train(recipe, show=False).summary
    except Exception as error:
        if came():  # of a library that a signal has reached
            raise
        log.debug("the run has failed", exc_info=error)  # into its events.log
        said = " ".join(str(error).split())
        return record | {"error": said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"}
    finally:
        gc.collect()  # one model at a time
    seconds, figures = summary["train_seconds"], summary["eval_after"]
    return record | {
        "figures": {key: value for key, value in figures.items() if math.isfinite(value)},
        "not_finite": [key for key, value in figures.items() if not math.isfinite(value)],
        "steps": summary["steps"],
        "seconds": seconds,
        "tokens": round(summary["tokens_per_second"] * seconds),
    }


def _result(plan: Plan, done: dict[str, tuple[float, list[Record]]], spent: Sequence[Record]) -> dict[str, Any]:
    """All that is known so far."""
    study, overrides = plan.study, {arm.name: arm.overrides for arm in plan.arms}
    base = done.get(plan.baseline, (0.0, []))
    arms = {name: _arm(overrides[name], share, runs) | {"difference": {}} for name, (share, runs) in done.items()}
    for name, (share, runs) in done.items():
        if share == base[0] and name != plan.baseline:
            arms[name]["difference"] = dict(_differences(runs, base[1]))
    measured = list(dict.fromkeys(key for arm in arms.values() for key in arm["figures"]))
    return {
        "recipe": study.recipe,
        "set": study.set,
        "seeds": list(study.seeds),
        "baseline": plan.baseline,
        "halving": study.halving and study.halving.model_dump(),
        "figures": [key for key in study.figures or FIGURES if key in measured] or measured,
        "runs": {"planned": _planned(plan), "done": len(spent), "failed": sum("error" in run for run in spent)},
        "compute": {key: sum(run.get(key, 0) for run in spent) for key in ("steps", "seconds", "tokens")},
        "arms": arms,
    }


def _arm(overrides: dict[str, Any], share: float, runs: list[Record]) -> dict[str, Any]:
    """What an arm's runs say together."""
    finished = [run for run in runs if "error" not in run]
    return {
        "overrides": overrides,
        "share": share,
        "failures": len(runs) - len(finished),
        **{key: _mean([run[key] for run in finished]) for key in ("steps", "seconds", "tokens")},
        "figures": {key: interval(list(own.values())) for key, own in _by_seed(runs).items()},
        "runs": runs,
    }


def _planned(plan: Plan) -> int:
    arms, runs = len(plan.arms), 0
    for share in plan.shares:
        runs += arms * len(plan.study.seeds)
        arms = _kept(plan, arms) if share < 1 else arms
    return runs


def _kept(plan: Plan, arms: int) -> int:
    assert plan.study.halving
    return math.ceil(arms / plan.study.halving.eta)


def _by_seed(runs: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Figure -> its value by seed, of the runs that have it."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        for key, value in run.get("figures", {}).items():
            found.setdefault(key, {})[run["seed"]] = value
    return found


def _differences(runs: Sequence[Record], baseline: Sequence[Record]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figure -> what the runs have more than the baseline's of the same seeds."""
    base = _by_seed(baseline)
    for key, own in _by_seed(runs).items():
        if difference := paired(own, base.get(key, {})):
            yield key, difference


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _best(plan: Plan, arms: Sequence[Arm], done: dict[str, tuple[float, list[Record]]]) -> tuple[Arm, ...]:
    """The arms that go on, in their order.

    Raises:
        UserError: no run has the figure that decides.
    """
    assert plan.study.halving
    by = plan.study.halving.by
    means = {}
    for arm in arms:
        if values := _by_seed(done[arm.name][1]).get(by):
            means[arm.name] = interval(list(values.values()))["mean"]
    if not means:
        known = sorted({key for _, runs in done.values() for key in _by_seed(runs)})
        raise UserError(f"halving by {by}: no run has that figure; there are {', '.join(known) or 'none'}")
    lower = by in LOWER_IS_BETTER or by.startswith(SQUARED_ERROR)
    order = sorted(means, key=lambda name: means[name] * (1 if lower else -1))
    stay = order[: _kept(plan, len(arms))]
    print(f"by {by} go on: {'; '.join(stay)}", flush=True)
    return tuple(arm for arm in arms if arm.name in stay)


def _say(arm: Arm, record: Record, place: str, share: float) -> None:
    """A line of a run."""
    rung = "" if share == 1 else f" ({share:.3g} of the steps)"
    if "error" in record:
        told = f"FAILED: {record['error']}"
    else:
        shown = [key for key in FIGURES if key in record["figures"]]
        told = ", ".join(f"{key} {record['figures'][key]:+.4f}" for key in shown)
        told += f", {counted(record['steps'], 'step')} in {in_time(record['seconds'])}"
        told += f"; NOT FINITE: {', '.join(record['not_finite'])}" if record["not_finite"] else ""
    print(f"{place} {arm.name}, seed {record['seed']}{rung}: {told}", flush=True)
