"""Rows as `align score` takes them, in windows that the input alone decides."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from align.data import Row, stream_rows
from align.data.one_form import Form
from align.data.row_numbers import WEIGHT
from align.data.schema import TEMPLATE_OPTIONS, BadRow, UnusableRow
from align.data.source_view import WHERE, SourceView
from align.data.sources import StreamedRow
from align.data.tools import TOOLS
from rewards.types import Asked

GIVEN = {"rewards": "given_rewards", "grades": "given_grades"}
"""What a row brings of what is computed here -> the column that keeps it."""


@dataclass(frozen=True)
class Item:
    """One row of the input: what is scored and what is kept, or why it cannot be."""

    source: str
    number: int
    raw: object
    """As the file holds it."""
    reason: str | None = None
    """What is wrong with it and how to mend it, with file, row and field."""
    prompt: Any = None
    completions: tuple[Any, ...] = ()
    answers: tuple[Any, ...] = ()
    """The reference answer for each scorer that needs one; None for the others."""
    kept: dict[str, Any] | None = None
    """The output row, but for rewards and grades."""

    @property
    def is_text(self) -> bool:
        """Whether it is plain text throughout, which no chat template is put around."""
        return self.reason is None and isinstance(self.prompt, str)


def windows(
    path: str,
    *,
    split: str | None,
    answer_columns: Sequence[str | None],
    size: int,
    ignore: Sequence[str] = (),
    view: SourceView | None = None,
    check: Callable[[dict[str, Any]], object] = lambda row: None,
    one_form: bool = False,
) -> Iterator[tuple[list[Item], int]]:
    """The rows in windows of at least `size` completions, the last one excepted, and how many completions each has.

    Args:
        path: a file, a folder or a hub data set.
        answer_columns: for each scorer, the column of its reference answers, or None.
        ignore: columns that count as absent.
        view: the mapping of the rows' columns and the condition on them; a row that is not asked for is in no window.
        check: raises BadRow for a row, in the output's form, that could not be finished once it is scored.
        one_form: refuse text beside conversations, of which a scorer's chat template would write the ones alone.

    Raises:
        UserError: nothing can be read at that path, or its rows are of two forms.
    """
    form = Form()
    window: list[Item] = []
    held = 0
    for record in stream_rows(path, split=split, ignore=ignore, view=view):
        if isinstance(record.row, UnusableRow) and str(record.row) == WHERE:
            continue
        if one_form and isinstance(record.row, Row):
            form.check(record.row)
        item = _item(record, answer_columns, ignore, check)
        window.append(item)
        held += max(len(item.completions), 1)
        if held >= size:
            yield window, sum(len(item.completions) for item in window)
            window, held = [], 0
    if window:
        yield window, sum(len(item.completions) for item in window)


def as_json(value: Any) -> str:
    """One line of a file of ours.

    Raises:
        BadRow: a value that JSON cannot hold, or text that is not valid Unicode.
    """
    try:
        line = json.dumps(value, ensure_ascii=False, default=_as_text)
        line.encode()
    except UnicodeEncodeError:
        raise BadRow(None, "holds half a character (a lone surrogate)", "mend the text") from None
    except TypeError as error:
        raise BadRow(None, f"holds a value that JSON cannot ({error})", "remove the column") from None
    return line


def _item(
    record: StreamedRow,
    answer_columns: Sequence[str | None],
    ignore: Sequence[str],
    check: Callable[[dict[str, Any]], object],
) -> Item:
    row, source, number = record.row, record.source, record.number
    if isinstance(row, BadRow):
        return Item(source, number, record.raw, row.message(source, number))
    if not isinstance(row, Row):
        return Item(source, number, record.raw, f"{source}, row {number}: {row}; mend or remove the row")
    raw: dict[str, Any] = record.raw  # type: ignore[assignment]
    try:
        if isinstance(row.prompt, list) and isinstance(row.prompt[0], int):
            raise BadRow("prompt_ids", "token ids", "give text; a scorer has a tokenizer of its own")
        answers = tuple(_answer(column, raw, row) for column in answer_columns)
        kept = _kept(raw, row, ignore)
        as_json(kept)
        check(kept)
    except BadRow as error:
        return Item(source, number, record.raw, error.message(source, number))
    prompt = Asked.of(row.prompt, row.template_arguments)  # type: ignore[arg-type]
    return Item(source, number, raw, None, prompt, row.completions, answers, kept)


def _answer(column: str | None, raw: dict[str, Any], row: Row) -> Any:
    if column is None:
        return None
    answer = raw.get(column, row.meta.get(column))
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise BadRow(column, "no reference answer", "give text or a number; a scorer compares with it")
    return answer


def _kept(raw: dict[str, Any], row: Row, ignore: Sequence[str]) -> dict[str, Any]:
    """The row in the canonical form, with the columns that its format does not use, or was told not to, as they are."""
    canonical: dict[str, Any] = {"id": raw["id"]} if raw.get("id") is not None else {}
    canonical |= {"prompt": row.prompt, "completions": list(row.completions)}
    canonical |= {TEMPLATE_OPTIONS: row.template_options} if row.template_options else {}
    canonical |= {TOOLS[0]: row.tools} if row.tools else {}
    unread = (*row.meta, *ignore, "meta", WEIGHT)
    others = {name: value for name, value in raw.items() if name in unread and value is not None}
    others |= {name: row.meta[name] for name in row.unread}
    made = row.meta.keys() - raw.keys() - (raw.get("meta") or {}).keys()
    others |= {name: own for name, own in row.meta.items() if name in made}
    given = {GIVEN[name]: list(getattr(row, name)) for name in GIVEN if getattr(row, name) is not None}
    return {**canonical, **given, **{name: value for name, value in others.items() if name not in canonical}}


def _as_text(value: Any) -> str:
    """Dates and decimal numbers, which Parquet knows and JSON does not, as their usual text."""
    if isinstance(value, bytes):
        raise TypeError("bytes")
    return str(value)
