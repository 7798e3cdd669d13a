"""A row's own `weight` and `margin`: read from its columns, and written as columns of the tokenised lists."""

from typing import Any

import numpy as np
from datasets import Dataset

from align.data.columns import how_to_ignore
from align.data.schema import BadRow, number
from align.data.windows import windows
from align.errors import UserError

WEIGHT, MARGIN = "weight", "margin"
LOSS_WEIGHT = "loss_weight"
"""Column of the tokenised lists; `weight` is there their source's share in the mixture."""
ABSENT = "weight 0"
"""Why a row of weight 0 is not used, as it is counted."""


def take_numbers(columns: dict[str, Any], *, margin: bool = True) -> dict[str, float]:
    """Of a row the `loss_weight` and the `margin` that its columns state, as fields of Row; none of those they do not.

    The weight is taken out: 2 is the row twice in a step, 0 its absence. The margin stays, since a reward model reads
    it under a name of its own.

    Args:
        margin: whether the completions count, so that a margin may stand between them.

    Raises:
        BadRow: no finite number, or a weight below 0.
    """
    found: dict[str, float] = {}
    if columns.get(WEIGHT) is not None:
        found["loss_weight"] = _weight(columns.pop(WEIGHT))
    if margin and columns.get(MARGIN) is not None:
        found["margin"] = _number(columns[MARGIN], MARGIN, "it is in the scores' unit")
    return found


def with_row_numbers(lists: Dataset, *, margins: bool) -> Dataset:
    """Lists whose columns `loss_weight` and `margin` are there where some row has its own: without, nothing costs
    anything.

    Args:
        lists: tokenised, with both columns.
        margins: whether anything reads margins.

    Raises:
        UserError: a margin below 0, where one is read.
    """
    found = [[own.to_numpy() for own in window.columns] for window in windows(lists, LOSS_WEIGHT, MARGIN)]
    weights, given = (np.concatenate([np.zeros(0), *own]) for own in (zip(*found, strict=True) if found else ((), ())))
    if not (weights != 1).any():
        lists = lists.remove_columns(LOSS_WEIGHT)
    if not margins or not given.any():
        return lists.remove_columns(MARGIN)
    if (given < 0).any():
        row = lists.select_columns(["source", "row"])[int((given < 0).argmax())]
        raise UserError(
            f"{row['source']}, row {row['row']}, field {MARGIN}: {given[given < 0][0]:g}; give 0 or more, since the "
            f"better completion is chosen, or {how_to_ignore(MARGIN)}"
        )
    return lists


def _weight(value: object) -> float:
    what = "it says how often the row counts"
    found = _number(value, WEIGHT, what)
    if found < 0:
        raise BadRow(WEIGHT, f"{found:g} is below 0", f"give 0 or more ({what}), or {how_to_ignore(WEIGHT)}")
    return found


def _number(value: object, field: str, what: str) -> float:
    try:
        return number(value, field)
    except BadRow as error:
        raise BadRow(field, error.problem, f"give a finite number ({what}), or {how_to_ignore(field)}") from None
