"""The rows of CSV and TSV files, in which every cell is text."""

import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from align.data.bad_row import BadRow
from align.data.packed import LINE, is_packed, lines_of
from align.data.strict_json import literal, loads
from align.errors import UserError

DELIMITED = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
DELIMITERS = ",;\t|"
NUMBER = re.compile(r"[+-]?(?:\d+(?P<fraction>\.\d*)?|(?P<point>\.\d+))(?P<exponent>[eE][+-]?\d+)?")
DIGITS = 4300
"""Of a number at most; Python reads no longer one."""
TRUTH = {"true": True, "false": False}
LONGEST = 2**31 - 1
"""Characters of a cell at most; Python's own limit of 131072 is less than a long answer."""


def delimited_records(file: Path) -> Iterator[tuple[str, int, object]]:
    """A file's rows, one object each: row 1 is the first below the header; an empty cell counts as absent.

    Raises:
        UserError: the quoting is broken, two columns have one name, or nothing can be read.
    """
    csv.field_size_limit(LINE if is_packed(file) else LONGEST)  # of which the reader holds four bytes each
    number = 0
    try:
        with _opened(file) as text:
            delimiter = _delimiter(file, next(lines_of(file, text), ""))
        with _opened(file) as text:
            rows = csv.reader(lines_of(file, text), delimiter=delimiter, strict=True)
            names = _names(file, next(rows, []))
            for cells in filter(None, rows):
                number += 1
                yield str(file), number, _row(names, cells)
    except csv.Error as error:
        remedy = "put a text with quotes, delimiters or line breaks in quotes, and write each quote in it twice"
        raise UserError(f"{file}: broken quoting after row {number} ({error}); {remedy}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: broken gzip data after row {number} ({error}); fetch the file again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: looks like UTF-16, but is not ({error.reason}); save it as UTF-8") from None


def _opened(file: Path) -> IO[str]:
    """The file's text; bytes that are no UTF-8 become half characters, which its row is then refused for."""
    opened = gzip.open if is_packed(file) else open
    with opened(file, "rb") as start:
        mark = start.read(2)
    encoding = "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return opened(file, "rt", encoding=encoding, errors="surrogateescape", newline="")


def _delimiter(file: Path, line: str) -> str:
    """The one that gives the header most columns, and of two the one that the file's name says."""
    given = "\t" if ".tsv" in file.name else ","
    counts = {own: len(next(csv.reader([line], delimiter=own), [])) for own in DELIMITERS}
    return max(DELIMITERS, key=lambda own: (counts[own], own == given))


def _names(file: Path, header: list[str]) -> list[str]:
    """The columns' names; one without, such as pandas' index, is called as pandas calls it."""
    names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(header)]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{file}: the column `{twice}` is there twice; rename or remove one")
    return names


def _row(names: list[str], cells: list[str]) -> object:
    if len(cells) != len(names):
        problem = f"{len(cells)} cells for {len(names)} columns"
        return BadRow(None, problem, "put texts that hold the delimiter in quotes", raw="\t".join(cells))
    row = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    for name, cell in row.items():
        if not cell.isascii() and re.search("[\udc80-\udcff]", cell):
            shown = cell.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
            return BadRow(name, "not UTF-8", "save the file as UTF-8", raw=shown)
    return row


def typed_cell(text: str) -> Any:
    """What a cell says that holds a number, true or false, or a list or object in JSON or as Python writes it.

    Text that is none of these stays as it is.
    """
    bare = text.strip()
    if len(bare) <= DIGITS and (match := NUMBER.fullmatch(bare)):
        return float(bare) if any(match.groups()) else int(bare)
    if bare.lower() in TRUTH:
        return TRUTH[bare.lower()]
    return listed_cell(text)


def listed_cell(text: str) -> Any:
    """What a cell says that holds a list or an object in JSON or as Python writes it; other text as it is."""
    bare = text.strip()
    if not bare.startswith(("[", "{")):
        return text
    for parse in (loads, literal):
        try:
            return parse(bare)
        except ValueError:
            continue
    return text
