"""Places in a row's objects and lists: `answers.good`, `answers[0].text`, `answers[].text`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.strict_json import loads

Path = tuple[str, ...]
EACH = "[]"
"""The step into every entry of a list."""
STEP = re.compile(r"(?:^|\.)([^.\[\]]+)|\[(-?\d*)\]")
NOTHING: Any = object()


def path_of(text: str) -> Path:
    """The steps of a place: names of columns and keys, places in lists, and `[]` for every entry of one.

    Raises:
        ValueError: it is none.
    """
    steps: list[str] = []
    end = 0
    for match in STEP.finditer(text):
        if match.start() != end:
            break
        end = match.end()
        name, place = match.groups()
        steps.append(name if name is not None else place or EACH)
    if end != len(text) or not steps or text.startswith((".", "[")):
        raise ValueError(f"`{text}` is no column; write `column`, `column.key`, `column[0].key` or `column[].key`")
    return tuple(steps)


def value_at(value: Any, path: Sequence[str]) -> Any:
    """What stands there, None where nothing does; a list of it behind `[]`. Text of JSON is read for what it says."""
    for k, step in enumerate(path):
        value = _opened(value)
        if step == EACH:
            return [value_at(entry, path[k + 1 :]) for entry in value] if isinstance(value, list) else None
        if isinstance(value, list):
            value = _entry(value, step)
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


def without_paths(value: Any, paths: Sequence[Path]) -> Any:
    """The value without what stands at these places; NOTHING where that was all."""
    if not all(paths):
        return NOTHING
    value = _opened(value)
    if not isinstance(value, list | Mapping):  # another row has an object there
        return value
    entries = list(enumerate(value)) if isinstance(value, list) else list(value.items())
    left = []
    for name, entry in entries:
        names = (str(name), str(name - len(value)), EACH) if isinstance(value, list) else (name,)
        below = [path[1:] for path in paths if path[0] in names]
        rest = without_paths(entry, below) if below else entry
        if rest is not NOTHING:
            left.append((name, rest))
    if not left:
        return NOTHING
    return [entry for _, entry in left] if isinstance(value, list) else dict(left)


def _entry(values: list[Any], step: str) -> Any:
    try:
        return values[int(step)]
    except (IndexError, ValueError):
        return None


def _opened(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return loads(value)
        except ValueError:
            return value
    return value
