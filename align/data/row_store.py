"""Rows on disk: written as they are read, and read again one at a time, so that memory does not grow with the texts.

Of every row a few numbers stay in memory, about 50 bytes: where it stands, a digest of its prompt, its file.
"""

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, overload

import numpy as np

from align.data.schema import Row, is_messages, is_token_ids, row_of
from align.data.select import prompt_digest
from align.data.turns import has_turns

FIELDS = tuple(field.name for field in fields(Row))
TUPLES = ("completions", "grades", "rewards", "completion_ids", "unread")
MESSAGES, IDS, WEIGHED, UNWEIGHTED = 1, 2, 4, 8
"""What tokenising must know of all rows before it begins; see `traits_of`."""
_JSON = json.JSONEncoder(default=str, ensure_ascii=False)
TOGETHER = 64
"""Rows that are read at once."""
FILE, INDEX = "rows.jsonl", "rows.npz"


_fields_of = attrgetter(*FIELDS)


def encoded(row: Row) -> bytes:
    """A row as one line of JSON; what JSON has no word for, such as a date of a Parquet file, is its text."""
    values = [*_fields_of(row)]
    return _JSON.encode(values).encode("utf-8", "surrogatepass") + b"\n"


def decoded(line: bytes) -> Row:
    """The row that `encoded` has written."""
    values = dict(zip(FIELDS, json.loads(line.decode("utf-8", "surrogatepass")), strict=True))
    for name in TUPLES:
        values[name] = None if values[name] is None else tuple(values[name])
    if values["token_weights"] is not None:
        values["token_weights"] = tuple(map(tuple, values["token_weights"]))
    return row_of(values)


def as_read(row: Row) -> tuple[Any, Any]:
    """Prompt and completions, as the token ids that were sampled where the row has them."""
    return (row.prompt, row.completions) if row.completion_ids is None else (row.prompt_ids, row.completion_ids)


def traits_of(row: Row) -> int:
    """MESSAGES: its prompt is a conversation; IDS: token ids; WEIGHED: some message may be learnt in part, not at all
    or by a weight; UNWEIGHTED: no weights of tokens.
    """
    prompt, _ = as_read(row)
    traits = (MESSAGES if is_messages(prompt) else 0) | (IDS if is_token_ids(prompt) else 0)
    talks = [own for own in row.completions if is_messages(own)] if row.completion_ids is None else []
    if any(has_turns(own) or any(m.get("weight", 1) != 1 for m in own) for own in talks):  # type: ignore[arg-type, union-attr]
        traits |= WEIGHED
    return traits | (UNWEIGHTED if row.token_weights is None else 0)


class RowWriter:
    """Writes rows to a folder's files, and keeps what must be known of all of them."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        """Args:
        folder: is made.
        seed: of the prompts' digests.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.seed = folder, seed
        self._file = (folder / FILE).open("wb")
        self._offsets, self._sources, self._traits, self._prompts = array("q", [0]), array("l"), array("B"), bytearray()
        self._names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def add(self, row: Row) -> None:
        """Write one row behind the others."""
        self._offsets.append(self._offsets[-1] + self._file.write(encoded(row)))
        self._sources.append(self._names.setdefault(row.source, len(self._names)))
        self._traits.append(traits_of(row))
        self._prompts += prompt_digest(row.prompt, self.seed)

    def close(self) -> "RowStore":
        """End the files; what stands there."""
        self._file.close()
        arrays: dict[str, Any] = {
            "offsets": np.array(self._offsets, dtype=np.int64),
            "sources": np.array(self._sources, dtype=np.int32),
            "traits": np.array(self._traits, dtype=np.uint8),
            "prompts": np.frombuffer(bytes(self._prompts), dtype="S16"),
            "names": np.frombuffer(json.dumps(list(self._names)).encode(), dtype=np.uint8),
        }
        np.savez(self.folder / INDEX, **arrays)
        return RowStore(self.folder)


class RowStore:
    """All rows that a RowWriter has written."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / INDEX) as kept:
            self.offsets, self.traits, self.prompts = kept["offsets"], kept["traits"], kept["prompts"]
            self.sources = kept["sources"]
            self.names: list[str] = json.loads(kept["names"].tobytes())
        self._file = (folder / FILE).open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self.sources)

    def read(self, place: int) -> Row:
        """The row at a place; no other comes into memory."""
        (row,) = self.read_all(np.array([place]))
        return row

    def read_all(self, places: np.ndarray) -> Iterator[Row]:
        """The rows at some places; those of them that stand in a row are read together."""
        for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
            ends = self.offsets[run[0] : run[-1] + 2].tolist() if len(run) else [0]
            lines = os.pread(self._file.fileno(), ends[-1] - ends[0], ends[0])
            for start, end in pairwise(ends):
                yield decoded(lines[start - ends[0] : end - ends[0]])


@dataclass(frozen=True)
class StoredRows(Sequence[Row]):
    """Some of a store's rows, each read when it is asked for."""

    store: RowStore
    places: np.ndarray
    """Of the rows in the store, in their order."""
    change: Callable[[Row], Row] | None = None
    """What becomes of each row when it is read."""

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> "StoredRows": ...
    def __getitem__(self, at: int | slice) -> "Row | StoredRows":
        if isinstance(at, slice):
            return self.chosen(np.arange(len(self))[at])
        row = self.store.read(int(self.places[at]))
        return self.change(row) if self.change else row

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), TOGETHER):
            rows = self.store.read_all(self.places[start : start + TOGETHER])
            yield from map(self.change, rows) if self.change else rows

    def chosen(self, at: Any) -> "StoredRows":
        """Those at these places of this sequence, or where a mask of its length is true."""
        return StoredRows(self.store, self.places[at], self.change)

    def with_traits(self, wanted: int) -> "StoredRows":
        """Those with any of these traits, as `traits_of` tells them."""
        return self.chosen(self.store.traits[self.places] & wanted != 0)

    def source(self, at: int) -> str:
        """The file of a row, which need not be read for it."""
        return self.store.names[self.store.sources[self.places[at]]]


def stored(rows: Sequence[Row], folder: Path) -> StoredRows:
    """Rows that are in memory, on disk."""
    writer = RowWriter(folder, seed=0)
    for row in rows:
        writer.add(row)
    return StoredRows(writer.close(), np.arange(len(rows)))
