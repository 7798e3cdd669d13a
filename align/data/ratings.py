"""What a reward model learns besides grades: ratings by name, strength of preference, and the set a row is of."""

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from align.data.delimited import typed_cell
from align.data.schema import ATTRIBUTES, Row, is_finite
from align.errors import UserError


def with_ratings(
    lists: Dataset,
    rows: Sequence[Row],
    *,
    names: Sequence[str],
    strength: str,
    sets: dict[str, int],
    deviation: str | None = None,
) -> Dataset:
    """Lists with the columns `attributes` [K, A] (NaN where a rating is missing), `strength`, `set` and `deviations`.

    Args:
        lists: tokenised, with `kept`.
        rows: what they were made of, in their order.
        names: of the ratings, in the order of the head's outputs.
        strength: the column that holds a row's strength of preference; NaN where a row has none.
        sets: number of each preference set by the file its rows come from.
        deviation: the column that holds how far raters differ, if any is read; NaN [K, A] where a row has none.

    Raises:
        UserError: a rating or a strength is no number, or their count is not that of the completions.
    """
    attributes, strengths, deviations = [], [], []
    for row, kept in zip(rows, lists["kept"][:], strict=True):
        rated = ratings_of(row, names)
        attributes.append([rated[k] for k in kept])
        strengths.append(_strength(row, strength))
        if deviation is not None:
            spread = _deviations(row, names, deviation)
            deviations.append([spread[k] for k in kept])
    columns: dict[str, list] = {"deviations": deviations} if deviation is not None else {}
    columns |= {"attributes": attributes, "strength": strengths, "set": [sets[row.source] for row in rows]}
    for name, values in columns.items():
        lists = lists.add_column(name, values)
    return lists


def ratings_of(row: Row, names: Sequence[str]) -> list[list[float]]:
    """The ratings of each completion in the order of `names`; NaN where there is none.

    They are in the column `attributes`, an object per completion, or in columns of their own: a number for a lone
    completion, a list of numbers for several.

    Raises:
        UserError: something else is there.
    """
    count = len(row.completions)
    rated = row.meta.get(ATTRIBUTES)
    if rated is None:
        columns = {name: row.meta[name] for name in names if name in row.meta}
        rated = [{name: _of_completion(row, name, value, k) for name, value in columns.items()} for k in range(count)]
    if not isinstance(rated, list) or len(rated) != count or not all(isinstance(r, dict | None) for r in rated):
        raise UserError(f"{row.place}, field {ATTRIBUTES}: not a list of {count} objects; give one per completion")
    return [[_number(row, name, (r or {}).get(name)) for name in names] for r in rated]


def _deviations(row: Row, names: Sequence[str], column: str) -> list[list[float]]:
    """By completion and name: a number for all of a completion's ratings, or an object of numbers."""
    value = row.meta.get(column)
    if value is None:
        return [[math.nan] * len(names)] * len(row.completions)
    found = []
    for k in range(len(row.completions)):
        own = _of_completion(row, column, value, k)
        given = [own.get(name) if isinstance(own, dict) else own for name in names]
        found.append([_number(row, column, number) for number in given])
    if bad := [number for own in found for number in own if number < 0]:
        raise UserError(f"{row.place}, field {column}: a deviation of {bad[0]:g}; give 0 or more, or null")
    return found


def _of_completion(row: Row, name: str, value: Any, k: int) -> Any:
    if not isinstance(value, list):
        value = [value]
    if len(value) != len(row.completions):
        count = len(row.completions)
        raise UserError(f"{row.place}, field {name}: {len(value)} ratings for {count} completions; give one for each")
    return value[k]


def _number(row: Row, name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, str):  # a cell of a table of text
        value = typed_cell(value)
    is_beyond = isinstance(value, int) and not is_finite(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or is_beyond:
        said = "a whole number beyond float64" if is_beyond else f"{value!r} is no number"
        raise UserError(f"{row.place}, field {name}: {said}; give one, or null where there is none")
    return float(value)


def _strength(row: Row, name: str) -> float:
    value = _number(row, name, row.meta.get(name))
    if value < 0:
        raise UserError(f"{row.place}, field {name}: a strength of {value:g}; give 0 or more, the better one is chosen")
    return value
