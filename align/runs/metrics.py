"""The lines of metrics.jsonl: each ends with a checksum of the rest."""

import json
import logging
import zlib
from pathlib import Path
from typing import Any

log = logging.getLogger("align")

CHECKSUM = ', "crc32": '


def as_line(values: dict[str, Any]) -> str:
    """A line of figures."""
    text = json.dumps(values)
    return f"{text[:-1]}{CHECKSUM}{zlib.crc32(text.encode())}}}\n"


def without_checksum(line: str) -> str:
    """A line's figures; one that has no checksum, as an online run's lines, is taken as it is.

    Raises:
        ValueError: the line is not as it was written.
    """
    text, mark, checksum = line.rpartition(CHECKSUM)
    if not mark:
        return line
    if checksum != f"{zlib.crc32((text + '}').encode())}}}":
        raise ValueError("is damaged, its checksum is another one")
    return text + "}"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The figures of every line; one that is damaged, or that a kill has cut short, is passed over, and said."""
    found = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else (), start=1):
        try:
            found.append(dict(json.loads(without_checksum(line.decode()))))
        except (ValueError, TypeError):
            log.warning("%s, line %d: damaged, passed over", file, number)
    return found


def any_heldout(lines: list[dict[str, Any]]) -> bool:
    """Whether the policy was measured on held-out lists in the middle of training."""
    return any("eval_loss" in line for line in lines)
