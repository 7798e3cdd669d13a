"""`align score`: what happens in which order."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from rich.console import Console

from align.cluster.connect import Cluster, on_cluster, worked
from align.data.schema import malformed
from align.data.source_view import SourceView, mapping_of
from align.disk import check_fits, size_of
from align.errors import UserError
from align.files import remove_folder, replaced
from align.progress import counted, progress, stage
from align.scoring.assemble import assembled, part_names
from align.scoring.cache import RewardCache, default_cache_dir
from align.scoring.items import Item, as_json, windows
from align.scoring.job import Job, write_rows
from align.scoring.references import References
from align.scoring.scoring import Part
from align.scoring.window import Scoring, Task, start_scoring
from align.tables import Table
from align.types import LONGEST_WAIT
from rewards import Reward, read_reward
from rewards.combine import Combination, transforms_for
from rewards.digest import reads_text_without_template, scorer_digest
from rewards.grading import GradeMethod
from rewards.types import Running

OnError = Literal["stop", "collect"]
OF_A_REWARD, CACHED = 20, 72
"""Bytes that a reward takes in a row, and in the cache."""
PACKED = 0.3
"""Of what gzip and Parquet leave of a row, about."""
COLLECT = " (--on-error collect sets such rows aside with their reasons)"


def score_rows(
    path: str,
    output: str,
    *,
    rewards: Sequence[Any],
    combination: Combination = "weighted_sum",
    grades: GradeMethod = "win_probability",
    split: str | None = None,
    ignore: Sequence[str] = (),
    columns: Sequence[str] = (),
    where: str | None = None,
    on_error: OnError = "stop",
    window: int = 1024,
    exact: bool = False,
    tokens_per_batch: int | None = None,
    cache: str | Path | None = None,
    use_cache: bool = True,
    ray: str | None = None,
    actors: int | None = None,
    gpus: float | None = None,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Put rewards and grades on rows; run again after a kill, it goes on and gives the same file.

    Args:
        path: rows of K >= 1 completions: a file, a folder or a hub data set.
        output: a .jsonl, .jsonl.gz or .parquet file.
        rewards: what `rewards.read_reward` reads, one or more.
        ignore: columns that count as absent.
        columns: `name=place` for each column that the rows have elsewhere.
        where: a condition on the rows' own columns; others are left out.
        combination: how several rewards become one.
        grades: how rewards become grades.
        on_error: stop before the first reward if a row is malformed, or collect such rows in OUTPUT.errors.jsonl.
        window: completions that are sorted by length, scored and written together, at least.
        exact, tokens_per_batch: laid over the scorers' own settings.
        cache: folder of cached rewards; by default below the user's cache folder.
        use_cache: read and keep rewards there.
        ray: address of a Ray cluster whose actors score the windows, or `local`; the files stay the same.
        actors, gpus: how many actors, and of how many GPUs; by default what the cluster holds.
        allow_code: consent to functions that a file of `rewards` names although it may be a stranger's.

    Returns:
        The summary, as in OUTPUT.summary.json.

    Raises:
        UserError: an input that cannot be read, a malformed row, or an output that is another job's.
        ScorerError: a scorer that cannot be made or does not work.

    Source: ours
    """
    console = console or Console()
    seen = SourceView(mapping_of(columns), where)
    # Without a GPU accelerate starts no process group unless it is told that this is meant.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    specs = [_overlaid(read_reward(spec, allow_code=allow_code), exact, tokens_per_batch) for spec in rewards]
    references = References(transforms_for(specs, combination), part_names(specs))
    with stage("reading the scorers' files"):
        parts = [Part(spec.scorer, scorer_digest(spec.scorer), k) for k, spec in enumerate(specs)]
    description = {
        "input": _input_identity(path, split, output) | _chosen(ignore, columns, where),
        **_described(specs, parts, references, output),
        **{"combination": combination, "grades": grades, "on_error": on_error, "window": window},
    }
    job = Job(Path(output).expanduser(), description)
    job.check()
    if job.finished():
        return _print_finished(job, specs, console, main=state.is_main_process)
    answers = [getattr(spec.scorer, "answer_column", None) for spec in specs]
    options: dict[str, Any] = {"split": split, "answer_columns": answers, "size": window, "check": references.of}
    options["one_form"] = any(reads_text_without_template(part.config) for part in parts)

    def read(view: SourceView) -> Iterator:
        return windows(path, **options, ignore=ignore, view=view)

    held = job.alone() if state.is_main_process else nullcontext()
    with on_cluster(ray, actors, gpus) as cluster:
        count, total, each = _check_rows(read(seen), on_error)
        if seen.left_out and state.is_main_process:
            console.print(f"{counted(seen.left_out, 'row')} left out by --where")
        store = RewardCache(Path(cache).expanduser() if cache else default_cache_dir()) if use_cache else None
        _check_room(job, store, total, each, len(parts))
        with held:
            if state.is_main_process:
                job.open(store.state() if store else 0)
            state.wait_for_everyone()
            again = read(SourceView(seen.columns, where))
            _score_windows(job, again, Scoring(parts), store, total, on_error, state, cluster)
            state.wait_for_everyone()
            if state.is_main_process:
                job.expect_parts(count)
                rows = assembled(job, specs, references, combination, grades)
                summary = _finish(job, rows, parts, store)
                _print(console, job, summary, specs)
            state.wait_for_everyone()
    return summary if state.is_main_process else {}


def _described(specs: Sequence[Reward], parts: Sequence[Part], references: References, output: str) -> dict[str, Any]:
    """The scorers by their settings and contents, and the rows that they are compared with."""
    described: dict[str, Any] = {
        "rewards": [spec.model_dump(mode="json") for spec in specs],
        "digests": [part.digest for part in parts],
    }
    if references.files:
        described["references"] = [_input_identity(file, None, output) for file in references.files]
    return described


def _chosen(ignore: Sequence[str], columns: Sequence[str], where: str | None) -> dict[str, Any]:
    """What of the input is read, and under which names; what is not given is left out, as older outputs have it."""
    given = {"ignore": list(ignore), "columns": list(columns), "where": where}
    return {name: value for name, value in given.items() if value}


def _overlaid(reward: Reward, exact: bool, tokens_per_batch: int | None) -> Reward:
    """The reward with what the command line says about how models are run."""
    if not isinstance(reward.scorer, Running):
        return reward
    changes: dict[str, Any] = {"exact": True} if exact else {}
    if tokens_per_batch is not None:
        changes["tokens_per_batch"] = tokens_per_batch
    return reward.model_copy(update={"scorer": reward.scorer.model_copy(update=changes)})


def _input_identity(path: str, split: str | None, output: str) -> dict[str, Any]:
    """What tells an input from another one of the same name: its files' sizes and times of change."""
    place = Path(path).expanduser()
    if place.is_dir() and Path(output).expanduser().resolve().is_relative_to(place.resolve()):
        raise UserError(f"{output}: lies in the input's folder and would be read as rows; give a place outside it")
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    stats = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()}
    return {"path": path, "split": split, "files": stats}


@stage("reading the rows")
def _check_rows(read: Iterator, on_error: OnError) -> tuple[int, int, float]:
    """Read the whole input once before anything is scored.

    Returns:
        How many windows and completions there are to score, and bytes of a completion with its share of a row, as the
        first window has them.

    Raises:
        UserError: malformed rows where they are not collected, or no row at all.
    """
    bad: list[str] = []
    count = total = 0
    each = 0.0
    for count, (window, completions) in enumerate(read, start=1):  # noqa: B007 - used behind the loop
        total += completions
        if count == 1:
            each = sum(len(as_json(item.kept)) for item in window if item.kept) / max(completions, 1)
        bad += [item.reason for item in window if item.reason is not None]
    if bad and on_error == "stop":
        raise UserError(f"{malformed(bad)}{COLLECT}")
    if not count:
        raise UserError("the input has no rows; give a file that holds some")
    return count, total, each


def _check_room(job: Job, store: RewardCache | None, total: int, each: float, scorers: int) -> None:
    """Refuse a job whose parts and output, or whose rewards in the cache, a disk cannot hold.

    Raises:
        UserError: says how much is needed, and how much is free.
    """
    rewards = OF_A_REWARD * (scorers + 2)  # each scorer's, their sum and the grade
    output = (each + rewards) * (1 if job.output.suffix == ".jsonl" else PACKED)
    whole = total * (each + rewards + output)
    check_fits(job.output, whole, "it and its parts", "give another output", held=size_of(job.folder))
    if store is not None:
        check_fits(store.path, total * scorers * CACHED, "the rewards", "give --cache another folder, or --no-cache")


def _score_windows(
    job: Job,
    read: Iterator,
    scoring: Scoring,
    store: RewardCache | None,
    total: int,
    on_error: OnError,
    state: Any,
    cluster: Cluster | None,
) -> None:
    """Score this process's share of the windows that have no part yet, here or in a cluster."""
    cache_state = job.cache_state()
    with progress("score", total, unit="completions", show=state.is_main_process) as advance:

        def left() -> Iterator[Task]:
            for number, (items, completions) in enumerate(read):
                if number % state.num_processes == state.process_index and not job.part(number).exists():
                    yield Task(number, items, completions, scoring.cached(items, store, cache_state))
                else:
                    advance(completions)

        start = partial(start_scoring, scoring.parts) if cluster else lambda: scoring
        devices = int(any(isinstance(part.config, Running) for part in scoring.parts))
        for task, (text, reason) in worked(cluster, start, left(), devices=devices):
            if reason is not None and on_error == "stop":
                raise UserError(reason + COLLECT)
            job.write_part(task.number, text)
            advance(task.completions)


@stage("writing the output")
def _finish(job: Job, rows: Callable[[], Iterator], parts: Sequence[Part], store: RewardCache | None) -> dict[str, Any]:
    """Write the output and what goes beside it, and fill the cache."""
    write_rows(job.output, rows)
    counts = job.counts()
    if counts["errors"]:
        with replaced(job.errors) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(failed) + "\n" for failed in job.failed())
    else:
        job.errors.unlink(missing_ok=True)
    if store is not None:
        store.add(_keyed(job, parts))
    seconds = counts.pop("seconds")
    summary: dict[str, Any] = {name: int(value) for name, value in counts.items()}
    busy = max(seconds, 1e-9)
    summary |= {"seconds": seconds, "completions_per_second": summary["completions"] / busy}
    summary["tokens_per_second"] = summary["tokens"] / busy
    job.close(summary)
    return summary


def _keyed(job: Job, parts: Sequence[Part]) -> Iterator[tuple[bytes, float]]:
    """Every reward of the job under its key."""
    for entry in job.scored():
        row = entry["row"]
        item = Item("", 0, None, None, row["prompt"], tuple(row["completions"]), tuple(entry["answers"]))
        for part, rewards in zip(parts, entry["rewards"], strict=True):
            yield from zip(part.keys(item), rewards, strict=True)


def _print(console: Console, job: Job, summary: dict[str, Any], specs: Sequence[Reward]) -> None:
    table = Table(show_header=False, title=str(job.output), title_justify="left")
    table.add_row("rewards", ", ".join(part_names(specs)))
    table.add_row("rows / completions", f"{summary['rows']} / {summary['completions']}")
    if summary["errors"]:
        table.add_row("rows set aside", f"{summary['errors']}, with reasons in {job.errors}")
    if summary["cached"]:
        table.add_row("rewards from the cache", str(summary["cached"]))
    if summary["truncated"]:
        share = summary["truncated"] / max(summary["scored"], 1)
        table.add_row("texts truncated", f"{summary['truncated']} of {summary['scored']} ({share:.1%})")
    rate = f"{summary['completions_per_second']:.1f} completions/s"
    if summary["tokens"]:
        rate += f", {summary['tokens_per_second']:.0f} tokens/s"
    table.add_row("time", f"{summary['seconds']:.1f} s, {rate}")
    console.print(table)
    if texts := summary["text_rows_without_template"]:
        console.print(f"{texts} text rows scored without the model's chat template", highlight=False, soft_wrap=True)


def _print_finished(job: Job, specs: Sequence[Reward], console: Console, *, main: bool) -> dict[str, Any]:
    """Nothing is left to do but what a kill may have left over."""
    summary = job.read_summary()
    if main:
        remove_folder(job.folder)
        _print(console, job, summary, specs)
    return summary
