"""The tables at the end of a study."""

from pathlib import Path
from typing import Any

from rich.console import Console

from align.progress import counted, in_time
from align.report.study_page import PAGE, STUDY, in_interval
from align.tables import Table


def print_study(path: Path, result: dict[str, Any], console: Console | None = None) -> None:
    """Each arm's figures with their intervals, what it has more than the baseline, and what it took."""
    console = console or Console()
    console.print(_table(result))
    if any(arm["difference"] for arm in result["arms"].values()):
        console.print(_differences(result))
    for name, arm in result["arms"].items():
        for run in arm["runs"]:
            if "error" in run:
                console.print(f"FAILED {name}, seed {run['seed']}: {run['error']}", markup=False, soft_wrap=True)
            elif run["not_finite"]:
                names = ", ".join(run["not_finite"])
                console.print(f"NOT FINITE, left out of means: {name}, seed {run['seed']}: {names}", markup=False)
    compute = result["compute"]
    runs = counted(result["runs"]["done"], "run")
    console.print(f"{runs}, {compute['tokens']:,} completion tokens in {in_time(compute['seconds'])} of training")
    console.print(f"figures: {path / STUDY}\nreport: {path / PAGE}", markup=False, soft_wrap=True, highlight=False)


def _table(result: dict[str, Any]) -> Table:
    seeds = counted(len(result["seeds"]), "seed")
    table = Table(title=f"held out, after training: mean of {seeds} ± half of the 95 % interval", title_justify="left")
    halving = any(arm["share"] < 1 for arm in result["arms"].values())
    for header in ("", *(["share"] if halving else []), "runs", *result["figures"], "steps", "s"):
        table.add_column(header, justify="right" if header else "left")
    for name, arm in result["arms"].items():
        done = len(arm["runs"]) - arm["failures"]
        shares = [f"{arm['share']:.3g}"] if halving else []
        runs = f"{done} of {len(arm['runs'])}" if arm["failures"] else str(done)
        figures = [in_interval(arm["figures"].get(key)) for key in result["figures"]]
        took = [f"{arm[key]:.0f}" if arm[key] is not None else "" for key in ("steps", "seconds")]
        table.add_row(name, *shares, runs, *figures, *took)
    return table


def _differences(result: dict[str, Any]) -> Table:
    title = f"more than {result['baseline']}, seed by seed ± half of the 95 % interval; * excludes zero"
    table = Table(title=title, title_justify="left")
    for header in ("", *result["figures"]):
        table.add_column(header, justify="right" if header else "left")
    for name, arm in result["arms"].items():
        if arm["difference"]:
            table.add_row(name, *(_starred(arm["difference"].get(key)) for key in result["figures"]))
    return table


def _starred(difference: dict[str, Any] | None) -> str:
    excludes = difference and difference["low"] is not None and (difference["low"] > 0 or difference["high"] < 0)
    return in_interval(difference, signed=True) + ("*" if excludes else "")
