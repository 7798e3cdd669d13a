"""What a row format is: one class, which says what its rows look like and what to read of them."""

from functools import lru_cache
from graphlib import TopologicalSorter
from typing import ClassVar

from align.data.columns import Columns
from align.data.row_numbers import MARGIN, WEIGHT
from align.data.schema import TEMPLATE_OPTIONS, BadRow, UnusableRow
from align.data.tools import TOOLS
from align.registry import Registry

SYSTEMS = ("system", "system_prompt", "system_message")
OF_LIST = (WEIGHT, MARGIN, *TOOLS, TEMPLATE_OPTIONS, *SYSTEMS)
"""Columns that a list has once, however many rows it is made of."""


class Format:
    """Base of a format's class; the first paragraph of its docstring says in `docs/rows.md` what such a row holds.

    A reader takes the columns that it uses out of the row and returns what `align.data.parts.parts_of` makes: `prompt`,
    `completions`, `grades`, `rewards`, and `names`, which is what the file calls these, for messages. It may add `kept`
    (columns to keep as `meta`), `unread` (keys of a list's objects that it does not use, such as `items[].model`),
    `guessed` (the prompt is only what the texts have in common) and `tools` (in any spelling, from elsewhere than the
    column `tools`). A column that it leaves in the row and that looks like a part of a preference is refused, so that
    nothing is dropped in silence.
    """

    name: ClassVar[str]
    shape: ClassVar[str]
    """Its columns, as the documentation and the refusal of an unknown row show them."""
    published: ClassVar[str] = ""
    """Who publishes rows of just this shape; empty for a general one. An unknown row is told the general ones."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The columns that it always has: `detect` is asked only of rows that have them all."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """Columns that are kept with the row, and that are no part of a preference whatever their names look like."""
    before: ClassVar[tuple[str, ...]] = ()
    """Names of the more general formats that would detect such a row too, and so are asked later."""

    any_of: ClassVar[tuple[str, ...]] = ()
    """Likewise columns of which it has one at least."""
    numbers: ClassVar[tuple[str, ...]] = ()
    """Columns that hold numbers, for a file that has text for everything."""
    joins: ClassVar[tuple[str, ...]] = ()
    """Columns that neighbouring rows share whose completions are one list; `joined` makes one row of them."""
    splits: ClassVar[bool] = False
    """Whether a row of the file holds several lists; `split` makes a row of each."""

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        """Whether a row is of this format; its columns that are null are not there."""
        return bool(cls.needs or cls.any_of) and _has_columns(cls, columns)

    @classmethod
    def holds_answers(cls, columns: Columns) -> bool:
        """Whether a row of this format has completions, and not a prompt alone, which `read_prompt` reads too."""
        return True

    @staticmethod
    def read(columns: Columns) -> Columns:
        """Take the parts of a preference out of a row's columns.

        Raises:
            BadRow: malformed.
            UnusableRow: well-formed, but nothing can be learnt from it.
        """
        raise NotImplementedError

    @classmethod
    def joined(cls, rows: list[Columns]) -> Columns:
        """One row of neighbours, all of which have `needs` and share `joins`: other columns become lists, but for `id`
        and what a list has once.

        Raises:
            BadRow: they differ in what a list has once; it has the place of the row at fault.
        """
        names = dict.fromkeys(name for row in rows for name in row)
        shared = {name: rows[0][name] for name in (*cls.joins, "id") if name in rows[0]} | of_list(rows)
        return {name: shared[name] if name in shared else [row.get(name) for row in rows] for name in names}

    @classmethod
    def split(cls, columns: Columns) -> list[Columns | UnusableRow]:
        """The rows that a row holds, each of any format, or why one of them cannot be used.

        Raises:
            BadRow: malformed.
        """
        return [columns]


def of_list(rows: list[Columns]) -> Columns:
    """What neighbouring rows of one list say of the list: its weight and margin, tools, system text and options.

    Raises:
        BadRow: they do not all say the same.
    """
    found: Columns = {}
    for name in OF_LIST:
        values = [row.get(name) for row in rows]
        odd = next((k for k, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            problem = f"another than the first row of its list has ({values[odd]!r}, and not {values[0]!r})"
            raise BadRow(f"{name}[{odd}]", problem, "the rows of a list share it: give them all the same")
        if values[0] is not None:
            found[name] = values[0]
    return found


FORMAT: Registry[Format] = Registry("format")


@lru_cache(maxsize=4096)
def candidates(names: tuple[str, ...], formats: tuple[type[Format], ...]) -> tuple[type[Format], ...]:
    """Of some formats those that a row with columns of these names may be of."""
    columns: Columns = dict.fromkeys(names)
    return tuple(format for format in formats if _has_columns(format, columns))


def _has_columns(format: type[Format], columns: Columns) -> bool:
    for name in format.needs:  # asked for every row: a generator would take four times as long
        if name not in columns:
            return False
    return not format.any_of or not columns.keys().isdisjoint(format.any_of)


def in_order(classes: dict[str, type[Format]]) -> dict[str, type[Format]]:
    """The formats as they are asked: each ahead of those it names in `before`; first those that nobody is ahead of.

    Within that the order is that of the names, so that it depends on no module's place.

    Raises:
        ValueError: `before` names no format, or two formats are each to be asked before the other.
    """
    sorter = TopologicalSorter[str]({name: () for name in sorted(classes)})
    for name in sorted(classes):
        for later in classes[name].before:
            if later not in classes:
                raise ValueError(f"the format `{name}` is to be asked before `{later}`, which is no format")
            sorter.add(later, name)
    return {name: classes[name] for name in sorter.static_order()}
