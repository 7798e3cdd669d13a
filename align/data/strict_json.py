"""JSON that loses nothing: no key is there twice, no number is none, and nothing is nested without end."""

import ast
import json
from collections import Counter
from typing import Any

from align.bounds import parse_python

DEEPEST = 100
"""Lists and objects within each other; what writes a row again, or a template, goes one call deeper for each."""
DIGITS = "a number of more digits than Python reads"


def decoder() -> json.JSONDecoder:
    """Python's, which raises ValueError for an object with a key twice and for infinities; NaN is float's."""
    return json.JSONDecoder(object_pairs_hook=once, parse_constant=_constant)


def loads(text: str) -> Any:
    """A text's JSON.

    Raises:
        ValueError: it is none, or would lose something; its words say what.

    Source: ours
    """
    try:
        value = decoder().decode(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST}") from None
    if is_deep(value):
        raise ValueError(f"nested deeper than {DEEPEST}")
    return value


def literal(text: str) -> Any:
    """What Python's own spelling says: `{'a': [1, None]}`.

    Raises:
        ValueError: it is none, or would lose something.

    Source: ours
    """
    try:
        tree = parse_python(text.strip(), "eval")
        value = ast.literal_eval(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                once([(ast.literal_eval(key), None) for key in node.keys if key is not None])
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"no literal of Python's ({error})") from None
    if is_deep(value):
        raise ValueError(f"nested deeper than {DEEPEST}")
    return value


def is_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other more than DEEPEST deep."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            own
            for one in level
            if isinstance(one, dict | list | tuple)
            for own in (one.values() if isinstance(one, dict) else one)
            if isinstance(own, dict | list | tuple)
        ]
        if not level:
            return False
    return True


def once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object whose keys are there once: of two equal ones, the first would be lost in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"`{twice}` is there twice")
    return found


def what_is_wrong(error: Exception) -> str:
    """Why a text is no JSON, in words."""
    if isinstance(error, RecursionError):
        return f"nested deeper than {DEEPEST}"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return DIGITS if "integer string" in str(error) else str(error)


def _constant(name: str) -> float:
    if name != "NaN":
        raise ValueError(f"{name} is no number")
    return float("nan")
