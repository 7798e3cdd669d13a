"""Files that are written whole or not at all, and read with a sentence where they are damaged."""

import json
from pathlib import Path
from typing import Any

from align.errors import UserError


def read_json(path: Path) -> Any:
    """What a JSON file of a run or an adapter holds.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged, not valid JSON ({error}); restore the file, or start anew") from None


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """The whole text or, after a kill, the old file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
