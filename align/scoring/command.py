"""`align score`: what happens in which order."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from align.data.schema import malformed
from align.errors import UserError
from align.progress import progress, stage
from align.scoring.assemble import assembled, part_names
from align.scoring.cache import RewardCache, default_cache_dir
from align.scoring.items import Item, windows
from align.scoring.job import Job, replaced, write_rows
from align.scoring.references import References
from align.scoring.scoring import Part, score_window
from align.types import LONGEST_WAIT
from rewards import Reward, read_reward
from rewards.combine import Combination, transforms_for
from rewards.digest import reads_text_without_template, scorer_digest
from rewards.grading import GradeMethod
from rewards.types import Running

OnError = Literal["stop", "collect"]
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
    on_error: OnError = "stop",
    window: int = 1024,
    exact: bool = False,
    tokens_per_batch: int | None = None,
    cache: str | Path | None = None,
    use_cache: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Put rewards and grades on rows; run again after a kill, it goes on and gives the same file.

    Args:
        path: rows of K >= 1 completions: a file, a folder or a hub data set.
        output: a .jsonl, .jsonl.gz or .parquet file.
        rewards: what `rewards.read_reward` reads, one or more.
        ignore: columns that count as absent.
        combination: how several rewards become one.
        grades: how rewards become grades.
        on_error: stop before the first reward if a row is malformed, or collect such rows in OUTPUT.errors.jsonl.
        window: completions that are sorted by length, scored and written together, at least.
        exact, tokens_per_batch: laid over the scorers' own settings.
        cache: folder of cached rewards; by default below the user's cache folder.
        use_cache: read and keep rewards there.

    Returns:
        The summary, as in OUTPUT.summary.json.

    Raises:
        UserError: an input that cannot be read, a malformed row, or an output that is another job's.
        ScorerError: a scorer that cannot be made or does not work.

    Source: ours
    """
    console = console or Console()
    # Without a GPU accelerate starts no process group unless it is told that this is meant.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    specs = [_overlaid(read_reward(spec), exact, tokens_per_batch) for spec in rewards]
    references = References(transforms_for(specs, combination), part_names(specs))
    with stage("reading the scorers' files"):
        parts = [Part(spec.scorer, scorer_digest(spec.scorer), k) for k, spec in enumerate(specs)]
    description = {
        "input": _input_identity(path, split, output) | ({"ignore": list(ignore)} if ignore else {}),
        "rewards": [spec.model_dump(mode="json") for spec in specs],
        "digests": [part.digest for part in parts],
        **{"combination": combination, "grades": grades, "on_error": on_error, "window": window},
    }
    if references.files:
        description["references"] = [_input_identity(file, None, output) for file in references.files]
    job = Job(Path(output).expanduser(), description)
    job.check()
    if job.finished():
        return _print_finished(job, specs, console, main=state.is_main_process)
    columns = [getattr(spec.scorer, "answer_column", None) for spec in specs]

    def read() -> Iterator:
        return windows(path, split=split, answer_columns=columns, size=window, ignore=ignore, check=references.of)

    count, total = _check_rows(read(), on_error)
    store = RewardCache(Path(cache).expanduser() if cache else default_cache_dir()) if use_cache else None
    if state.is_main_process:
        job.open(store.state() if store else 0)
    state.wait_for_everyone()
    _score_windows(job, read(), parts, store, total, on_error, state)
    state.wait_for_everyone()
    if state.is_main_process:
        job.expect_parts(count)
        rows = assembled(job, specs, references, combination, grades)
        summary = _finish(job, rows, parts, store)
        _print(console, job, summary, specs)
    state.wait_for_everyone()
    return summary if state.is_main_process else {}


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
def _check_rows(read: Iterator, on_error: OnError) -> tuple[int, int]:
    """Read the whole input once before anything is scored.

    Returns:
        How many windows and completions there are to score.

    Raises:
        UserError: malformed rows where they are not collected, or no row at all.
    """
    bad: list[str] = []
    count = total = 0
    for count, (window, completions) in enumerate(read, start=1):  # noqa: B007 - used behind the loop
        total += completions
        bad += [item.reason for item in window if item.reason is not None]
    if bad and on_error == "stop":
        raise UserError(f"{malformed(bad)}{COLLECT}")
    if not count:
        raise UserError("the input has no rows; give a file that holds some")
    return count, total


def _score_windows(
    job: Job,
    read: Iterator,
    parts: Sequence[Part],
    store: RewardCache | None,
    total: int,
    on_error: OnError,
    state: Any,
) -> None:
    """Score this process's share of the windows that have no part yet."""
    cache_state = job.cache_state()
    shown = state.is_main_process
    of_chats = any(reads_text_without_template(part.config) for part in parts)
    with progress("score", total, unit="completions", show=shown) as advance:
        for number, (window, completions) in enumerate(read):
            if number % state.num_processes == state.process_index and not job.part(number).exists():
                began, before = time.monotonic(), _tallies(parts)
                scored = score_window(window, parts, store, cache_state)
                failed = [own.item.reason for own in scored if own.item.reason is not None]
                if failed and on_error == "stop":
                    raise UserError(failed[0] + COLLECT)
                counts = {name: value - before[name] for name, value in _tallies(parts).items()}
                counts |= {"rows": len(scored) - len(failed), "errors": len(failed)}
                counts["text_rows_without_template"] = sum(own.item.is_text for own in scored) * of_chats
                counts["completions"] = sum(len(own.item.completions) for own in scored if own.rewards)
                job.write_part(number, scored, {**counts, "seconds": time.monotonic() - began})
            advance(completions)


def _tallies(parts: Sequence[Part]) -> dict[str, float]:
    tallies = [part.scorer.tally for part in parts if part.scorer is not None]
    return {
        "scored": sum(tally.completions for tally in tallies),
        "tokens": sum(tally.tokens for tally in tallies),
        "truncated": sum(tally.truncated for tally in tallies),
        "cached": sum(part.cached for part in parts),
    }


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
    summary: dict[str, Any] = json.loads(job.summary.read_text())
    if main:
        shutil.rmtree(job.folder, ignore_errors=True)
        _print(console, job, summary, specs)
    return summary
