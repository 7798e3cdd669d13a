"""What is packed, and how much of it is unpacked: a stranger's few bytes may stand for more than a machine holds."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, AnyStr

from align.errors import UserError

LINE = 2**28
"""Bytes, or characters of a table in text, of a line or a cell: in memory an empty list of two bytes takes 64."""
UNPACKED = 2**30
"""Bytes of a file with no row a line."""
UNPACKED_ROWS = 2**32
"""Bytes of memory for a table's rows that are unpacked at once: a dictionary may stand for any number of long texts."""
OF_A_LINE = 100
"""Bytes that Python takes for a line besides its own."""
MARKS = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip"}
"""What packed files begin with."""


def refuse_packed(file: Path) -> None:
    """Refuse a file that is packed, unless with gzip and so named.

    Raises:
        UserError: names what it is packed with.
    """
    with file.open("rb") as start:
        begins = start.read(max(map(len, MARKS)))
    kind = next((kind for mark, kind in MARKS.items() if begins.startswith(mark)), None)
    if kind is not None and not (kind == "gzip" and is_packed(file)):
        remedy = "let its name end with .gz" if kind == "gzip" else "unpack it, or pack it with gzip as .gz"
        raise UserError(f"{file}: packed with {kind}; {remedy}")


def is_packed(file: Path) -> bool:
    """Whether a file of rows is unpacked while it is read."""
    return file.name.endswith(".gz")


def lines_of(file: Path, opened: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of an open file.

    Raises:
        UserError: one is beyond the bound.
    """
    if not is_packed(file):
        yield from opened
        return
    number = 0
    while line := opened.readline(LINE + 1):
        number += 1
        if len(line) > LINE:
            raise UserError(f"{file}: line {number} is longer than {LINE:,} bytes unpacked; unpack the file")
        yield line


def all_lines(file: Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that is read as a whole.

    Raises:
        UserError: they are beyond the bound.
    """
    size = 0
    for number, line in lines:
        size += len(line) + OF_A_LINE
        if size > UNPACKED and is_packed(file):
            raise UserError(
                f"{file}: takes more than {UNPACKED:,} bytes unpacked, and has no row a line; write it so, or unpack it"
            )
        yield number, line
