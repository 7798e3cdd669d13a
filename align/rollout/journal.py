"""Rows that are finished one at a time, on disk: a kill loses none of them and doubles none."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align.files import replaced

Line = dict[str, Any]


class Journal:
    """A JSONL file that grows as `FILE.partial`, in any order, and becomes FILE, in the right one, when it is whole."""

    def __init__(self, path: Path) -> None:
        """Goes on from the lines that are there; a last one that a kill has cut short is removed."""
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.lines: dict[str, Line] = {}
        """By their `id`."""
        if path.exists():
            self.partial.unlink(missing_ok=True)
            self.lines = {line["id"]: line for line in read_lines(path)}
        elif self.partial.exists():
            _cut_torn_line(self.partial)
            self.lines = {line["id"]: line for line in read_lines(self.partial)}

    @property
    def whole(self) -> bool:
        """Whether `finish` was called."""
        return self.path.exists()

    def append(self, lines: Sequence[Line]) -> None:
        """Add finished lines, each with an `id` of its own."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.partial.open("a", encoding="utf-8") as file:
            file.write(text)
        self.lines |= {line["id"]: line for line in lines}

    def finish(self, ids: Sequence[str]) -> None:
        """All is there: write the lines in the order of these ids."""
        with replaced(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for name in ids:
                file.write(json.dumps(self.lines[name], ensure_ascii=False) + "\n")
        self.partial.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[Line]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
