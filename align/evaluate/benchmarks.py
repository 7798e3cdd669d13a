"""`align evaluate benchmarks`: lm-evaluation-harness before and after training, and which tasks the policy forgot.

Both sides answer the same documents, so that a change is judged by the standard error of the paired differences.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from align.consent import ALLOW, not_own
from align.errors import UserError
from align.evaluate.chat import Side, sides
from align.evaluate.in_options import in_options
from align.evaluate.rows import load_any
from align.files import read_json, write_json
from align.manifest import file_digest, json_digest
from align.model.policy import Policy
from align.progress import stage
from align.tables import Table

BENCHMARKS = "benchmarks.json"
BEYOND = 2.0
"""Standard errors that a fall must exceed to be called one."""
BOOTSTRAPS = 1000
"""Of a figure that is no mean over documents, such as a perplexity."""

log = logging.getLogger("align")

Figure = dict[str, Any]
"""before, after, change, standard_error, documents, higher_is_better, forgot."""


def evaluate_benchmarks(
    model: str,
    *,
    tasks: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    chat_template: str | None = None,
    json_path: str | None = None,
    trust_remote_code: bool = False,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Figures of lm-evaluation-harness before and after training, printed, written and returned.

    Args:
        model: a run directory, or an adapter's folder with its base before it; a plain model has no before.
        tasks: names of the harness's tasks or groups, or of those in `include_path`.
        include_path: a folder of task files of one's own; they are code, since their templates and functions run.
        num_fewshot: examples before each question, where the task leaves that open.
        limit: read only so many documents of each task.
        batch_size: texts of one forward pass.
        apply_chat_template: put each question into the model's chat template.
        chat_template: a Jinja file in place of the run's.
        json_path: where every figure is written; by default benchmarks.json of the run. Tasks that stand there, of the
            same policy and options, are not run again.
        allow_code: run task files that somebody else may have written.

    Raises:
        UserError: the harness is not installed, there is no such task, its data is not here, or the model does not fit.
    """
    harness = _harness()
    _check_own(include_path, allowed=allow_code)
    with in_options():
        policy, template = load_any(model, chat_template, trust_remote_code=trust_remote_code)
    is_run = (Path(model) / "recipe.yaml").exists()
    target = Path(json_path) if json_path else Path(model) / BENCHMARKS if is_run else None
    options = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template}
    asked = options | {"model": str(Path(model).resolve()), "policy": _identity(Path(model)), "lm_eval": harness}
    key = json_digest(asked | {"tasks": _digests(include_path), "chat_template": template})
    known = _known(target, key)
    with stage("reading the harness's tasks"):
        manager = _manager(include_path, tasks)
    result: dict[str, Any] = {**asked, "key": key, "tasks": dict(known)}
    for task in tasks:
        if task in known:
            log.info("%s: measured before, of the same policy and options", task)
            continue
        result["tasks"][task] = _task(task, manager, policy, sides(policy, is_run=is_run), batch_size, options)
        result |= _forgotten(result["tasks"])
        if target:
            write_json(target, result)
    result |= _forgotten(result["tasks"])
    _show(console or Console(), result, target)
    return result


def _harness() -> str:
    """The harness's version.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness is not here ({error}): pip install 'align-lm[lm-eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return version("lm_eval")


def _check_own(folder: str | None, *, allowed: bool) -> None:
    """Task files run functions beside them, and templates without bounds: they must be the user's own.

    Raises:
        UserError: there are none, or somebody else may have written one.
    """
    if folder is None:
        return
    files = sorted(Path(folder).rglob("*.yaml"))
    if not files:
        raise UserError(f"--include-path {folder}: holds no task file (*.yaml)")
    for file in files:
        if (reason := not_own(file)) and not allowed:
            raise UserError(f"{file}: a task file is code, and {reason}; read it, then give {ALLOW} if it may run")


def _digests(folder: str | None) -> dict[str, str]:
    files = sorted(Path(folder).rglob("*")) if folder else []
    return {str(file): file_digest(file) for file in files if file.is_file() and "__pycache__" not in file.parts}


def _identity(folder: Path) -> str | None:
    """What tells a run's policy from that of the same folder trained anew."""
    summary = folder / "summary.json"
    return file_digest(summary) if summary.is_file() else None


def _known(target: Path | None, key: str) -> Mapping[str, dict[str, Figure]]:
    """The tasks that have been measured with the same options."""
    if target is None or not target.is_file():
        return {}
    found = read_json(target)
    return found["tasks"] if isinstance(found, dict) and found.get("key") == key else {}


def _manager(include_path: str | None, tasks: Sequence[str]) -> Any:
    """What knows the tasks: one's own alone where they are enough, since reading all of the harness's takes seconds.

    Raises:
        UserError: there is no such task.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        import difflib

        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"--tasks: lm-evaluation-harness has no task `{unknown[0]}`{hint}")
    return manager


def _task(
    task: str, manager: Any, policy: Policy, both: Sequence[Side], batch_size: int, options: dict[str, Any]
) -> dict[str, Figure]:
    """One task's figures, of both sides.

    Raises:
        UserError: in place of whatever the harness says of data that is not here.
    """
    answers = {}
    for side in both:
        with side.model() as model, stage(f"{task}: {side.name}"):
            try:
                answers[side.name] = _answers(task, manager, model, policy, batch_size, options)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
                first = " ".join(str(error).split())[:300]
                raise UserError(
                    f"--tasks: {task} fails with {type(error).__name__}: {first}; where it is data that is not on this "
                    "machine, put it into the cache of `datasets` or give a task file of your own (--include-path) "
                    "whose data_files are here"
                ) from error
    return dict(_compared(answers.get("before"), answers.get("after") or answers["answer"]))


def _answers(
    task: str, manager: Any, model: Any, policy: Policy, batch_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What the harness says of a model: `results`, `samples` and `higher_is_better`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=policy.tokenizer, batch_size=batch_size)
    answers = simple_evaluate(
        model=wrapped, tasks=[task], task_manager=manager, bootstrap_iters=BOOTSTRAPS, log_samples=True, **options
    )
    return dict(answers)


def _compared(before: dict[str, Any] | None, after: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Every figure of a task, of a group's parts too, under `part.metric` or for the only part `metric`."""
    several = len(after["results"]) > 1
    for part, own in after["results"].items():
        for name, value in own.items():
            metric, comma, taken = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            higher = (after["higher_is_better"].get(part) or {}).get(metric)
            label = metric if taken == "none" else f"{metric},{taken}"
            was = before and before["results"][part][name]
            sure = _paired(before, after, part, metric, taken) if before else None
            yield (f"{part}.{label}" if several else label), _figure(was, value, sure, higher)


def _figure(before: Any, after: float, sure: tuple[float, int] | None, higher_is_better: bool | None) -> Figure:
    """Args:
    sure: the change's standard error, and of how many documents.
    """
    change = None if before is None else after - before
    error, documents = sure or (math.nan, 0)
    worse = change is not None and (change if higher_is_better else -change) < 0
    return {
        "before": before,
        "after": after,
        "change": change,
        "standard_error": None if math.isnan(error) else error,
        "documents": documents,
        "higher_is_better": higher_is_better,
        "forgot": bool(worse and higher_is_better is not None and abs(change or 0.0) > BEYOND * error),
    }


def _paired(
    before: dict[str, Any], after: dict[str, Any], part: str, metric: str, taken: str
) -> tuple[float, int] | None:
    """The standard error of a change and its documents: of their paired differences where the figure is their mean,
    else of two independent figures by the harness's bootstrap; None where neither is known.
    """
    name = f"{metric},{taken}"
    was, now = (_by_document(own["samples"].get(part, ()), metric, taken) for own in (before, after))
    shared = sorted(was.keys() & now.keys())
    n, change = len(shared), after["results"][part][name] - before["results"][part][name]
    if n > 1:
        differences = [now[key] - was[key] for key in shared]
        mean = sum(differences) / n
        if math.isclose(mean, change, rel_tol=1e-6, abs_tol=1e-9):
            return math.sqrt(sum((one - mean) ** 2 for one in differences) / (n - 1) / n), n
    errors = [own["results"][part].get(f"{metric}_stderr,{taken}") for own in (before, after)]
    if all(isinstance(error, int | float) for error in errors):
        return math.hypot(*errors), n
    return None


def _by_document(samples: Sequence[dict[str, Any]], metric: str, taken: str) -> dict[Any, float]:
    """A metric of each document, where it is one number."""
    own = {one["doc_id"]: one.get(metric) for one in samples if one.get("filter", "none") == taken}
    return {key: float(value) for key, value in own.items() if isinstance(value, int | float)}


def _forgotten(tasks: Mapping[str, Mapping[str, Figure]]) -> dict[str, Any]:
    names = [f"{task}.{metric}" for task, own in tasks.items() for metric, figure in own.items() if figure["forgot"]]
    return {"forgot": names, "forgotten": len(names)}


def _show(console: Console, result: dict[str, Any], target: Path | None) -> None:
    compares = any(figure["before"] is not None for own in result["tasks"].values() for figure in own.values())
    table = Table(title=f"lm-evaluation-harness {result['lm_eval']}", title_justify="left")
    for header in ("task", "figure", *(["before"] if compares else []), "after", *(["change", ""] if compares else [])):
        table.add_column(header, justify="left" if header in ("task", "figure", "") else "right")
    for task, own in result["tasks"].items():
        for metric, figure in own.items():
            error = figure["standard_error"]
            told = ["" if figure["before"] is None else f"{figure['before']:.4f}"] if compares else []
            change = f"{figure['change']:+.4f}" if compares and figure["change"] is not None else ""
            change += f" ± {error:.4f}" if change and error is not None else ""
            table.add_row(
                task, metric, *told, f"{figure['after']:.4f}", *([change, _verdict(figure)] if compares else [])
            )
    console.print(table)
    if compares:
        names = ", ".join(result["forgot"]) or "nothing"
        console.print(f"forgot (a fall beyond {BEYOND:g} standard errors): {names}", markup=False, soft_wrap=True)
    if target:
        console.print(f"figures: {target}", markup=False, soft_wrap=True, highlight=False)


def _verdict(figure: Figure) -> str:
    """forgot, better, within noise, or nothing where that is not known."""
    if figure["forgot"]:
        return "forgot"
    if figure["standard_error"] is None or figure["higher_is_better"] is None or figure["change"] is None:
        return ""
    return "better" if abs(figure["change"]) > BEYOND * figure["standard_error"] else "within noise"
