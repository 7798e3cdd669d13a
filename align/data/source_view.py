"""How a source's rows are seen: which of them, and under which names of columns."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from align.data.bad_row import BadRow
from align.data.delimited import listed_cell, typed_cell
from align.data.formats import FORMAT
from align.data.formats.lists import LISTS
from align.data.parts import ITEM_ATTRIBUTES, ITEM_REWARDS, LABELS, REWARDS, SIDE_REWARDS, prompt_name
from align.data.paths import NOTHING, Path, path_of, value_at, without_paths
from align.data.schema import JSON_MESSAGES, TEMPLATE_OPTIONS, UnusableRow
from align.data.where import Where, parse_where
from align.errors import UserError

NUMBERS = {*ITEM_REWARDS, *LABELS, "grade", "rank", "weight", "margin", "strength", *sum(SIDE_REWARDS, ())}
LISTED = {*LISTS, *REWARDS, *ITEM_ATTRIBUTES, "grades", "ranks", "messages", "conversations", "meta", TEMPLATE_OPTIONS}
ANSWERS = {"chosen", "rejected", "completion", *LISTS}
OWN = "file."
"""What a column's name begins with where the mapping gives its name to another."""
WHERE = "where"
"""Why a row is refused that is not asked for."""
MISSING = ("missing", "unknown format")
"""How a refusal begins for which a column that the mapping does not find may be the reason."""


def mapping_of(columns: Sequence[str]) -> dict[str, str]:
    """What a command line says of columns, `name=place` each.

    Raises:
        UserError: one of them is none.
    """
    pairs = [text.partition("=") for text in columns]
    for text, (name, _, place) in zip(columns, pairs, strict=True):
        if not name or not place:
            raise UserError(f"--column {text}: no mapping; write `name=place`, such as `prompt=question`")
    return {name: place for name, _, place in pairs}


@dataclass
class SourceView:
    """A source's mapping and condition, and what of them was found in the rows so far."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name of a column -> its place in the file, such as `answers.good` or `answers[0].text`."""
    where: str | None = None
    """A condition on the file's own columns."""
    turns: bool = False
    """Whether plain texts are turns: the prompt a user's message, an answer the assistant's."""

    def __post_init__(self) -> None:
        """Raise UserError for a place or a condition that cannot be read."""
        self.seen: set[str] = set()
        self.known: set[str] = set()
        self._rows = 0
        self.left_out = 0
        """Rows that were not asked for."""
        try:
            self._paths: dict[str, Path] = {name: path_of(place) for name, place in self.columns.items()}
            self._where: Where | None = parse_where(self.where) if self.where else None
        except ValueError as error:
            raise UserError(str(error)) from None

    def of(self, raw: dict[str, Any]) -> dict[str, Any]:
        """A row as the readers see it.

        Raises:
            UnusableRow: it is none of those that are asked for.
            BadRow: the condition cannot be applied to it.
        """
        if self._where is not None:
            self.known.update(name for name in self._where.columns() if name in raw)
            if not self._where.holds(raw):
                self.left_out += 1
                raise UnusableRow(WHERE)
        self._rows += 1
        columns = self._mapped(raw) if self.columns else raw
        return in_turns(columns) if self.turns else columns

    def own_error(self, error: BadRow, raw: dict[str, Any]) -> BadRow:
        """A refusal of a mapped row, in the file's own names."""
        if not self.columns:
            return error
        lost = [name for name in self.columns if raw.get(name) is None]
        if lost and error.problem.startswith(MISSING):
            problem = f"missing, and the source's `columns` has `{lost[0]}` there (columns: {', '.join(raw)})"
            return BadRow(self.columns[lost[0]], problem, "mend `columns`, or the row", raw=error.raw)
        name = re.match(r"[^.\[]*", error.field or "")[0]  # type: ignore[index]
        field = self.columns.get(name, name) + (error.field or "")[len(name) :]
        return BadRow(field or None, error.problem, error.remedy, raw=error.raw)

    def check(self, path: str) -> None:
        """Refuse a name that no row of the whole source has: a slip there would look like a column without values.

        Raises:
            UserError: names it.
        """
        for name in sorted(self._where.columns()) if self._where else ():
            if name not in self.known:
                raise UserError(f"{path}: no row has `{name}`, which the source's `where` reads; mend it")
        for name, place in self.columns.items() if self._rows else ():
            if name not in self.seen:
                raise UserError(
                    f"{path}: no row has `{place}`, which the source's `columns` reads as `{name}`; mend it"
                )

    def _mapped(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The row under our names, with what else it holds; a column whose name the mapping takes is `file.<name>`."""
        paths = {
            name: (self.columns[name],) if self.columns[name] in raw else path for name, path in self._paths.items()
        }
        found = {name: value_at(raw, path) for name, path in paths.items()}
        found = {name: value for name, value in found.items() if value is not None}
        self.seen |= found.keys()
        rest = without_paths(raw, list(paths.values()))
        others = {} if rest is NOTHING else rest
        opened = dict.fromkeys(path[0] for path in paths.values() if len(path) > 1)
        if ANSWERS & self.columns.keys():  # it says where the answers are: no format may look for them in what is left
            for name in opened:
                others |= _by_place(name, others.pop(name)) if name in others else {}
        lost = {"prompt": None} if "prompt" in self.columns and "prompt" not in found else {}  # and not to be guessed
        return {
            **lost,
            **found,
            **{OWN + name if name in self.columns else name: value for name, value in others.items()},
        }


def in_turns(columns: dict[str, Any]) -> dict[str, Any]:
    """A row whose plain texts are turns of a conversation, its instruction with the `input` below it; others as is.

    Source: LLaMA-Factory's converter.py, which renders every row by a chat template
    """
    name = prompt_name(columns)
    if name is None or not isinstance(columns[name], str):
        return columns
    turned = dict(columns)
    asked, below = turned.pop(name), turned.pop("input", None) if name == "instruction" else None
    turned["prompt"] = [{"role": "user", "content": f"{asked}\n{below}" if below else asked}]
    for answer in ("chosen", "rejected", "completion", "response", "output", "chosen_response", "rejected_response"):
        if isinstance(turned.get(answer), str):
            turned[answer] = [{"role": "assistant", "content": turned[answer]}]
    return turned


def _by_place(name: str, left: Any) -> dict[str, Any]:
    """What a mapping has left of an object or a list, each part by the name of its place."""
    if isinstance(left, dict):
        return {f"{name}.{key}": value for key, value in left.items()}
    if not isinstance(left, list):
        return {name: left}
    if not all(isinstance(entry, dict) for entry in left):
        return {f"{name}[]": left}
    keys = dict.fromkeys(key for entry in left for key in entry)
    return {f"{name}[].{key}": [entry.get(key) for entry in left] for key in keys}


def typed(columns: dict[str, Any]) -> dict[str, Any]:
    """A row of a file whose cells are all text, with numbers where its columns are grades, and lists likewise.

    Other texts stay texts, whatever they look like: an answer may be `42`.
    """
    numbers = NUMBERS | _numbers_of_formats()
    typed_row = {}
    for name, text in columns.items():
        value = text
        if isinstance(text, str):
            if name in numbers:
                value = typed_cell(text)
            elif name in LISTED or JSON_MESSAGES.match(text):
                value = listed_cell(text)
        typed_row[name] = value
    return typed_row


@lru_cache(maxsize=1)
def _numbers_of_formats() -> frozenset[str]:
    return frozenset(name for format in FORMAT.classes.values() for name in format.numbers)
