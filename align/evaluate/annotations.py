"""`align evaluate winrate`: pairwise annotations in, one model's win rate over a baseline out."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console

from align.data.schema import BadRow, malformed
from align.data.sources import records
from align.errors import UserError
from align.evaluate.winrate import Gamed, length_controlled, length_feature, win_rate
from align.files import write_json
from align.progress import stage
from align.tables import Table

WINNERS = {"baseline": 0.0, "tie": 0.5, "model": 1.0}
PREFERENCE = "write 1 (the baseline wins) to 2 (the model wins), 0 or 1.5 for a tie, null where the judge said nothing"

GAMED_COLUMNS = ("std_delta_len", "instruction_difficulty", "preference")


@dataclass(frozen=True)
class Annotation:
    """One judged pair of answers to one instruction."""

    place: str
    """File and row, for messages."""
    label: float | None
    """Probability that the model wins; None where the judge said nothing."""
    lengths: tuple[int, int] | None
    """Characters of the baseline's and the model's answer."""
    difficulty: float | None
    index: int | None
    """Of the instruction in the benchmark."""
    position: int
    """In the file, from 0."""
    names: tuple[str, str]
    """Baseline and model."""


def evaluate_winrate(
    path: str,
    *,
    controlled: bool = False,
    gamed: str | None = None,
    json_path: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """The win rate of one model, printed and returned.

    Args:
        path: annotations, as AlpacaEval writes them or a JSON object per line: `preference` or `winner`, and for
            the length-controlled win rate `output_1` and `output_2` or `len_1` and `len_2`.
        controlled: the length-controlled win rate too.
        gamed: AlpacaEval's `df_gamed.csv`, or the same columns as JSON lines: the gamed baselines, and with them
            every instruction's difficulty.
        json_path: where every figure is written as well.

    Raises:
        UserError: a row that cannot be read, several models in one file, or lengths or difficulties that are missing.
    """
    console = console or Console()
    if gamed and not controlled:
        raise UserError(f"{gamed}: gamed baselines serve the length-controlled win rate; add --length-controlled")
    rows = _read(path)
    judged = [row for row in rows if row.label is not None]
    if not judged:
        raise UserError(f"{path}: no row has a preference; give annotations that hold some")
    baseline, model = _names(rows)
    labels = [row.label for row in judged if row.label is not None]
    figures: dict[str, Any] = {
        "annotations": path,
        **{"baseline": baseline, "model": model},
        "rows": {"read": len(rows), "judged": len(judged), "without_a_preference": len(rows) - len(judged)},
        **win_rate(labels),
    }
    lengths = [row.lengths for row in judged if row.lengths is not None]
    if len(lengths) == len(judged):
        figures["mean_length"] = {"baseline": fmean(a for a, _ in lengths), "model": fmean(b for _, b in lengths)}
    if controlled:
        figures["length_controlled"] = _controlled(judged, labels, len(rows), gamed)
    console.print(_table(figures))
    console.print("\n".join(_sentences(figures)), highlight=False)
    if json_path:
        write_json(Path(json_path), figures)
    return figures


def _read(path: str) -> list[Annotation]:
    rows: list[Annotation] = []
    bad: list[str] = []
    for file, number, record in records(path):
        try:
            rows.append(_annotation(record, f"{file}, row {number}", len(rows) + len(bad)))
        except BadRow as error:
            bad.append(error.message(file, number))
    if bad:
        raise malformed(bad)
    return rows


def _annotation(record: object, place: str, position: int) -> Annotation:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(None, "not a JSON object", "write one object per annotation")
    return Annotation(
        place=place,
        label=_label(record),
        lengths=_lengths(record),
        difficulty=_number(record, "instruction_difficulty"),
        index=_index(record),
        position=position,
        names=(str(record.get("generator_1") or "baseline"), str(record.get("generator_2") or "model")),
    )


def _index(record: dict[str, Any]) -> int | None:
    index = _number(record, "index")
    if index is not None and (index < 0 or index != int(index)):
        raise BadRow("index", f"{index:g} is no place in the benchmark", "count the instructions 0, 1, 2, ...")
    return None if index is None else int(index)


def _label(record: dict[str, Any]) -> float | None:
    if "winner" in record:
        winner = record["winner"]
        if winner not in (None, *WINNERS):
            raise BadRow("winner", f"{winner!r}", f"write {', '.join(WINNERS)}, or null")
        return None if winner is None else WINNERS[winner]
    if "preference" not in record:
        raise BadRow("preference", "missing", f"{PREFERENCE}; or give `winner`: {', '.join(WINNERS)}")
    value = record["preference"]
    if value is None or value != value:  # AlpacaEval writes NaN where it could not read the judge's answer
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or 1 <= value <= 2):
        raise BadRow("preference", f"{value!r}", PREFERENCE)
    return 0.5 if value == 0 else float(value) - 1


def _lengths(record: dict[str, Any]) -> tuple[int, int] | None:
    found = []
    for side in ("1", "2"):
        text, length = record.get(f"output_{side}"), _number(record, f"len_{side}")
        if isinstance(text, str):
            found.append(len(text))
        elif length is not None:
            found.append(int(length))
    return (found[0], found[1]) if len(found) == 2 else None


def _number(record: dict[str, Any], field: str) -> float | None:
    value = record.get(field)
    if value is None:
        return None
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(field, f"{value!r} is no number", "write a finite number")
    return number


def _names(rows: Sequence[Annotation]) -> tuple[str, str]:
    """The two names, which all rows share."""
    for place, field in enumerate(("generator_1", "generator_2")):
        names = sorted({row.names[place] for row in rows})
        if len(names) > 1:
            other = next(row for row in rows if row.names[place] != rows[0].names[place])
            raise UserError(
                f"{other.place}, field {field}: {other.names[place]!r} after {rows[0].names[place]!r}; "
                "give the annotations of one model against one baseline, a file for each"
            )
    return rows[0].names


@stage("fitting the win rate at equal lengths")
def _controlled(judged: Sequence[Annotation], labels: Sequence[float], read: int, gamed: str | None) -> dict[str, Any]:
    lengths = []
    for row in judged:
        if row.lengths is None:
            raise UserError(
                f"{row.place}: no lengths to control for; give `output_1` and `output_2`, or `len_1` and `len_2`"
            )
        lengths.append(row.lengths)
    benchmark = _read_gamed(gamed) if gamed else None
    difficulty = _difficulties(judged, read, benchmark)
    found = length_controlled(
        labels,
        length_feature([a for a, _ in lengths], [b for _, b in lengths]),
        difficulty,
        gamed=benchmark.rows if benchmark else None,
    )
    figures = asdict(found)
    figures["weights"] = dict(zip(("length", "difficulty", "model"), found.weights, strict=True))
    return {**figures, "difficulty": difficulty is not None, "gamed": gamed}


@dataclass(frozen=True)
class Benchmark:
    """What `df_gamed.csv` holds."""

    rows: Gamed
    difficulty: dict[int, float]
    """By the instruction's index."""


def _read_gamed(path: str) -> Benchmark:
    found: dict[str, list[float]] = {name: [] for name in GAMED_COLUMNS}
    difficulty: dict[int, float] = {}
    for place, number, record in _table_rows(path):
        try:
            if isinstance(record, BadRow):
                raise record
            for name in GAMED_COLUMNS:
                value = _number(record, name) if isinstance(record, dict) else None
                if value is None:
                    raise BadRow(name, "missing", f"give the columns index, {', '.join(GAMED_COLUMNS)}")
                found[name].append(value)
            index = _index(record)
            if index is None:
                raise BadRow("index", "missing", "give the instruction's place in the benchmark")
            if not 0 <= found["preference"][-1] <= 1:
                raise BadRow("preference", f"{found['preference'][-1]:g}", "write 0 (the baseline wins) to 1 here")
        except BadRow as error:
            raise UserError(error.message(place, number)) from None
        difficulty.setdefault(index, found["instruction_difficulty"][-1])
    if not difficulty:
        raise UserError(f"{path}: no rows; give AlpacaEval's df_gamed.csv")
    length, hard, labels = (np.array(found[name]) for name in GAMED_COLUMNS)
    return Benchmark(Gamed(np.tanh(length), hard, labels), difficulty)


def _table_rows(path: str) -> Iterator[tuple[str, int, Any]]:
    """The rows of a CSV file, or of anything else that holds JSON objects."""
    if not path.endswith(".csv"):
        yield from records(path)
        return
    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), start=1):
                yield path, number, row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give AlpacaEval's df_gamed.csv") from None


def _difficulties(judged: Sequence[Annotation], read: int, benchmark: Benchmark | None) -> list[float] | None:
    """Of every row: its own, else the benchmark's by index; None where there are neither."""
    found = [row.difficulty for row in judged]
    if all(value is None for value in found):
        if benchmark is None:
            return None
        by_position = read == len(benchmark.difficulty) and all(row.index is None for row in judged)
        places = [row.position if by_position else row.index for row in judged]
        found = [None if place is None else benchmark.difficulty.get(place) for place in places]
    for row, value in zip(judged, found, strict=True):
        if value is None:
            raise UserError(
                f"{row.place}: its instruction's difficulty is not known; give every row `instruction_difficulty`, "
                "or its `index` in the benchmark and --gamed FILE"
            )
    return [value for value in found if value is not None]


def _table(figures: dict[str, Any]) -> Table:
    title = f"{figures['model']} against {figures['baseline']}"
    table = Table("", "win rate", "standard error", title=title, title_justify="left")
    rates = [("win rate", figures["win_rate"], figures["standard_error"])]
    if "length_controlled" in figures:
        own = figures["length_controlled"]
        rates.append(("length-controlled", own["win_rate"], own["standard_error"]))
    for name, rate, error in rates:
        table.add_row(name, f"{rate:.2f} %", "unknown" if error is None else f"{error:.2f}")
    return table


def _sentences(figures: dict[str, Any]) -> Iterator[str]:
    counts = figures["rows"]
    won = f"{figures['wins']} won, {figures['losses']} lost, {figures['ties']} tied (one half each)"
    yield f"{counts['judged']} judged: {won}"
    if counts["without_a_preference"]:
        yield f"{counts['without_a_preference']} rows without a preference are left out"
    if "mean_length" in figures:
        length = figures["mean_length"]
        yield f"mean length: model {length['model']:.0f} characters, baseline {length['baseline']:.0f}"
    if "length_controlled" in figures:
        own = figures["length_controlled"]
        weights = ", ".join(f"{name} {value:+.3f}" for name, value in own["weights"].items())
        yield f"weights: {weights} (C {own['c']:.3g} by cross-validation)"
        if not own["gamed"]:
            missing = "gamed baselines" if own["difficulty"] else "gamed baselines and difficulties"
            yield f"fitted without {missing} (--gamed): not the leaderboard's figure"
