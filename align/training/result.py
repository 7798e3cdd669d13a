"""A finished run as objects: its figures as tables, for a notebook or pandas."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.report.summary import ROWS
from align.runs.run_directory import RunDirectory

SHOWN = 20
"""Rows of a table that a notebook shows."""


class Table(Sequence[dict[str, Any]]):
    """Rows of figures by name; a notebook shows them."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return Table(self.rows[place]) if isinstance(place, slice) else self.rows[place]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def column(self, name: str) -> list[Any]:
        """A column's values in the rows that have it.

        Raises:
            UserError: no row has it; names those that there are.
        """
        if name not in self.columns:
            raise UserError(f"{name}: no such column; there are {', '.join(self.columns) or 'none'}")
        return [row[name] for row in self.rows if name in row]

    def to_pandas(self) -> Any:
        """A pandas.DataFrame of the rows.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas needs pandas: pip install pandas; the rows are in `.rows` without it") from None
        return pandas.DataFrame(self.rows, columns=self.columns)

    def __repr__(self) -> str:
        return f"Table({len(self.rows)} rows: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(_shown(row.get(name)))}</td>' for name in self.columns)}</tr>"
            for row in self.rows[:SHOWN]
        )
        left = f"<p>and {len(self.rows) - SHOWN} more rows</p>" if len(self.rows) > SHOWN else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{left}"


@dataclass(frozen=True, repr=False)
class RunResult:
    """A finished run: its directory, and what summary.json holds."""

    path: Path
    summary: dict[str, Any]

    @property
    def steps(self) -> Table:
        """The lines of metrics.jsonl of optimizer steps: loss, gradient norm, learning rate and more."""
        return Table([line for line in self._lines() if "eval_loss" not in line])

    @property
    def evaluations(self) -> Table:
        """Held-out figures in the middle of training, by step."""
        return Table([line for line in self._lines() if "eval_loss" in line])

    @property
    def heldout(self) -> Table:
        """Held-out figures before and after training, with their change and its standard error where lists allow."""
        before, after, changes = (self.summary.get(f"eval_{name}", {}) for name in ("before", "after", "change"))
        order = [key for key, *_ in ROWS if key in after] + [key for key in after if key not in {k for k, *_ in ROWS}]
        return Table(
            [{"figure": key, "before": before.get(key), "after": after[key], **changes.get(key, {})} for key in order]
        )

    @property
    def samples(self) -> Table:
        """Held-out prompts with what the policy wrote before and after training, and both rewards where there are."""
        return Table(self.summary.get("samples", []))

    def to_pandas(self) -> Any:
        """A pandas.DataFrame of `steps`.

        Raises:
            UserError: pandas is not installed.
        """
        return self.steps.to_pandas()

    def __repr__(self) -> str:
        return f"RunResult({str(self.path)!r}, {self.summary.get('steps', 0)} steps)"

    def _lines(self) -> list[dict[str, Any]]:
        return RunDirectory(self.path).read_metrics()

    def _repr_html_(self) -> str:
        steps, seconds = self.summary.get("steps", 0), self.summary.get("train_seconds", 0.0)
        return f"<p>{escape(str(self.path))}: {steps} steps in {seconds:.0f} s</p>{self.heldout._repr_html_()}"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
