"""Rows of a file become lists: neighbours that share a prompt are joined, and a row of several lists is split."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from align.data.formats import FORMAT, Format
from align.data.formats.base import candidates
from align.data.row_numbers import ABSENT, WEIGHT
from align.data.schema import BadRow, UnusableRow

Formats = tuple[type[Format], ...]


@dataclass(slots=True)
class Found:
    """A row as it was found, or made of what was."""

    source: str
    number: int
    """Of the first of its rows."""
    raw: object
    refused: BadRow | UnusableRow | None = None
    """Why it is not read."""
    others: tuple[int, ...] = ()
    """The numbers of the rows that were joined with its first."""
    gathered: bool = False
    """Whether its number of completions is what was found for its prompt."""


def gather(found: Iterable[Found]) -> Iterator[Found]:
    """The rows with neighbours joined and trees split, as their formats say; all others as they are.

    A row that is not asked for, or has the weight 0, does not part its neighbours, and is passed on before them.
    """
    joining = tuple(own for own in FORMAT.classes.values() if own.joins)
    splitting = tuple(own for own in FORMAT.classes.values() if own.splits)
    held: list[Found] = []
    held_key: tuple[Any, ...] | None = None
    for one in found:
        if held and isinstance(one.refused, UnusableRow):
            yield one
            continue
        key = _key(one, joining)
        if key is not None and one.raw.get(WEIGHT) == 0:  # type: ignore[attr-defined]
            yield replace(one, refused=UnusableRow(ABSENT))
            continue
        if held and key != held_key:
            yield from _parts(_joined(held_key[0], held), splitting)  # type: ignore[index]
            held = []
        held_key = key
        if key is None:
            yield from _parts(one, splitting)
        else:
            held.append(one)
    if held:
        yield from _parts(_joined(held_key[0], held), splitting)  # type: ignore[index]


def _key(found: Found, joining: Formats) -> tuple[Any, ...] | None:
    """Equal for neighbours that belong together; None for a row that stands for itself."""
    format = _format_of(found, joining)
    if format is None:
        return None
    return format, found.source, *(found.raw[name] for name in format.joins)  # type: ignore[index]


def _format_of(found: Found, formats: Formats) -> type[Format] | None:
    raw = found.raw
    if found.refused is not None or not isinstance(raw, dict):
        return None
    for format in candidates(tuple(raw), formats):
        if all(raw[name] is not None for name in format.needs) and format.detect(raw):
            return format
    return None


def _joined(format: type[Format], rows: list[Found]) -> Found:
    first, others = rows[0], tuple(row.number for row in rows[1:])
    try:
        raw = format.joined([row.raw for row in rows])  # type: ignore[misc]
    except (BadRow, UnusableRow) as error:
        return Found(first.source, first.number, first.raw, error, others)
    return Found(first.source, first.number, raw, None, others, gathered=True)


def _parts(one: Found, splitting: Formats) -> Iterator[Found]:
    """A row, or the rows that it holds."""
    format = _format_of(one, splitting)
    if format is None:
        yield one
        return
    try:
        parts = format.split(one.raw)  # type: ignore[arg-type]
    except (BadRow, UnusableRow) as error:
        yield replace(one, refused=error)
        return
    for k, part in enumerate(parts):
        refused = part if isinstance(part, UnusableRow) else None
        raw = one.raw if refused else part
        yield Found(one.source, one.number, raw, refused, () if k else one.others, gathered=True)
