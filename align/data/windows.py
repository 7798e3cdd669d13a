"""Columns of memory-mapped lists, a window of rows at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

ROWS = 2000
"""Of a window."""


def windows(lists: Dataset, *names: str) -> Iterator[pa.Table]:
    """These columns of all lists, in their order."""
    if lists._indices is None:  # in memory as they stand in the file
        table = lists.data.select(list(names)).table
        yield from (table.slice(start, ROWS) for start in range(0, len(lists), ROWS))
    elif len(lists):
        yield from lists.select_columns(list(names)).with_format("arrow").iter(ROWS)


def in_rows(window: pa.Table) -> Iterator[tuple[Any, ...]]:
    """A window's rows, each the values of its columns."""
    return zip(*(own.to_pylist() for own in window.columns), strict=True)


def lengths(column: pa.ChunkedArray) -> Any:
    """[N] int64: how many entries each value of a column of lists has."""
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def completion_tokens(lists: Dataset) -> Any:
    """[N] int64: tokens of every list's completions together, learnt or not."""
    found = [np.zeros(0, np.int64)]
    for window in windows(lists, "completion_ids"):
        column = window["completion_ids"]
        sizes, tokens = lengths(column), lengths(pc.list_flatten(column))
        ends = np.concatenate([[0], np.cumsum(tokens)])[np.cumsum(sizes)]
        found.append(np.diff(ends, prepend=0))
    return np.concatenate(found)
