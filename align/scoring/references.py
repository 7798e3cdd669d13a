"""The rewards that transforms hold a list against: those of the reference policy, from a column or its scored rows."""

from collections.abc import Sequence
from typing import Any

from align.data import Row, stream_rows
from align.data.schema import BadRow
from align.data.select import prompt_key
from align.errors import UserError
from rewards.transforms import Lsc, Samples, Standardize, Transform

Given = list[list[Sequence[float] | None]]
"""By scorer and transform: what `transform` takes as `references`."""
FEWEST = 2
"""Completions, or samples, without which nothing can be fitted to them."""


class References:
    """Looks up, for every row, the rewards that its transforms need beside the row's own."""

    def __init__(self, steps: Sequence[Sequence[Transform]], names: Sequence[str]) -> None:
        """Args:
        steps: every scorer's transforms.
        names: of the scorers' rewards, as in `reward_parts`.

        Raises:
            UserError: scored rows that cannot be read, or that have no rewards.
        """
        self.steps = steps
        lsc = [step for own in steps for step in own if isinstance(step, Lsc)]
        self.files = sorted({step.of.rows for step in lsc if isinstance(step.of, Samples)})
        self.sampled = {
            (k, place): _read(step.of.rows, names[k])
            for k, own in enumerate(steps)
            for place, step in enumerate(own)
            if isinstance(step, Lsc) and isinstance(step.of, Samples)
        }

    def of(self, row: dict[str, Any]) -> Given:
        """What the transforms of a row need.

        Raises:
            BadRow: it is not there, or too little of it; or the row's own completions are too few.
        """
        return [[self._one(row, k, place) for place in range(len(own))] for k, own in enumerate(self.steps)]

    def _one(self, row: dict[str, Any], k: int, place: int) -> Sequence[float] | None:
        step = self.steps[k][place]
        own = step.of == "own" if isinstance(step, Lsc) else isinstance(step, Standardize) and step.per == "prompt"
        if own and len(row["completions"]) < FEWEST:
            remedy = (
                "hold it against the reference policy's rewards (`of`)" if isinstance(step, Lsc) else "`per: dataset`"
            )
            raise BadRow(
                "completions",
                f"one completion, which {step.name} by its own list makes the same whatever its reward",
                remedy,
            )
        if not isinstance(step, Lsc) or step.of in (None, "own"):
            return None
        if isinstance(step.of, Samples):
            found = self.sampled[k, place].get(prompt_key(row["prompt"]))
            if found is None:
                raise BadRow("prompt", f"lsc finds no samples of it in {step.of.rows}", "sample and score it there")
            return _enough(found, "prompt", step)
        return _enough(_numbers(row, step.of.column), step.of.column, step)  # type: ignore[union-attr]


def _enough(found: list[float], column: str, step: Lsc) -> list[float]:
    if len(found) < FEWEST and step.reference != "mean":
        remedy = f"give {FEWEST} or more, or `reference: mean`"
        raise BadRow(column, f"{len(found)} rewards of the reference policy, too few for `{step.reference}`", remedy)
    return found


def _numbers(row: dict[str, Any], column: str) -> list[float]:
    meta = row.get("meta")
    value = row.get(column, meta.get(column) if isinstance(meta, dict) else None)
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e308 for v in values):
        raise BadRow(column, "no rewards of the reference policy", "give a list of numbers; lsc is held against them")
    return [float(v) for v in values]


def _read(path: str, name: str) -> dict[str, list[float]]:
    """Every prompt's rewards in rows that `align score` wrote, of the scorer's part where they have parts."""
    found: dict[str, list[float]] = {}
    for record in stream_rows(path):
        if not isinstance(record.row, Row) or record.row.rewards is None:
            continue
        parts = record.raw.get("reward_parts") if isinstance(record.raw, dict) else None
        own = (parts or {}).get(name, record.row.rewards)
        found.setdefault(prompt_key(record.row.prompt), []).extend(own)
    if not found:
        raise UserError(f"lsc: {path} has no rows with rewards; give what `align score` wrote of the reference policy")
    return found
