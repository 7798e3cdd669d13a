"""A condition on a row's own columns, `lang == 'en' and score > 3`, as data that is looked at and never run."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from align.bounds import parse_python
from align.data.bad_row import BadRow, kind
from align.data.paths import value_at

WORDS = {"true": True, "false": False, "null": None}
"""What JSON and YAML write for Python's constants."""
ORDERS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
EQUAL = (ast.Eq, ast.Is)
DIFFERENT = (ast.NotEq, ast.IsNot)
QUOTED = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|`([^`]+)`""")
KNOWN = "write comparisons (== != < <= > >=), `in`, `and`, `or`, `not`, constants and column names"
REMEDY = "mend the source's `where`, or the row"


@dataclass(frozen=True)
class Where:
    """A condition that a row holds or does not."""

    text: str
    tree: ast.expr
    names: dict[str, str] = field(default_factory=dict)
    """Stand-ins of the columns in back quotes."""

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is one of those that are asked for; a column that is null or not there is None.

        Nothing is larger or smaller than None. Between text and a number, or true and false, the text counts as what it
        says.

        Raises:
            BadRow: two values cannot be compared.
        """
        return bool(self._value(self.tree, row))

    def columns(self) -> set[str]:
        """The names of the columns that it reads."""
        names = {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}
        return {self.names.get(name, name) for name in names if name not in WORDS}

    def _value(self, node: ast.expr, row: Mapping[str, Any]) -> Any:
        match node:
            case ast.BoolOp(op=ast.And()):
                return all(self._value(own, row) for own in node.values)
            case ast.BoolOp():
                return any(self._value(own, row) for own in node.values)
            case ast.UnaryOp(op=ast.Not()):
                return not self._value(node.operand, row)
            case ast.Compare():
                return self._compare(node, row)
            case ast.Constant() | ast.UnaryOp() | ast.List() | ast.Tuple() | ast.Set():
                return ast.literal_eval(node)
            case ast.Name() if node.id in WORDS and node.id not in row:
                return WORDS[node.id]
        path = _path(node)
        return value_at(row, (self.names.get(path[0], path[0]), *path[1:]))

    def _compare(self, node: ast.Compare, row: Mapping[str, Any]) -> bool:
        sides = [node.left, *node.comparators]
        values = [self._value(side, row) for side in sides]
        for k, op in enumerate(node.ops):
            try:
                if not _holds(op, values[k], values[k + 1]):
                    return False
            except TypeError:
                kinds = f"{kind(values[k])} with {kind(values[k + 1])}"
                raise BadRow(None, f"`{ast.unparse(node)}` compares {kinds}", REMEDY) from None
        return True


@lru_cache(maxsize=64)
def parse_where(text: str) -> Where:
    """Read a condition.

    Args:
        text: comparisons, `and`, `or`, `not`, `in`, constants, and names of columns, of keys below them (`meta.lang`,
            `answers[0].score`), or in back quotes what is no word (`` `chosen-rating` ``).

    Raises:
        ValueError: it is none, or asks for anything else.

    Source: ours
    """
    names: dict[str, str] = {}

    def stand_in(match: re.Match[str]) -> str:
        if match[1] is not None:
            return match[1]
        name = f"column_in_quotes_{len(names)}"
        names[name] = match[2]
        return name

    try:
        tree = parse_python(QUOTED.sub(stand_in, text).strip(), "eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"`{text}` is no condition ({reason}); {KNOWN}") from None
    _check(tree, text)
    where = Where(text, tree, names)
    if not where.columns():
        raise ValueError(f"`{text}` names no column; {KNOWN}")
    return where


def _check(node: ast.expr, text: str) -> None:
    """Refuse what is no part of the small language.

    Raises:
        ValueError: names it.
    """
    match node:
        case ast.BoolOp():
            below = node.values
        case ast.UnaryOp(op=ast.Not()):
            below = [node.operand]
        case ast.Compare():
            below = [node.left, *node.comparators]
        case ast.List() | ast.Tuple() | ast.Set() if all(map(_is_constant, node.elts)):
            below = []
        case _:
            if not _is_constant(node) and not _path(node):
                raise ValueError(f"`{text}`: `{ast.unparse(node)}` is not allowed there; {KNOWN}")
            below = []
    for own in below:
        _check(own, text)


def _is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        node = node.operand
        return isinstance(node, ast.Constant) and type(node.value) in (int, float)
    return isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None)


def _path(node: ast.expr) -> tuple[str, ...]:
    """The steps to a column, or to a place below it; none where it is something else."""
    match node:
        case ast.Name():
            return (node.id,)
        case ast.Attribute():
            above, step = _path(node.value), node.attr
        case ast.Subscript() if _is_constant(node.slice) and not isinstance(node.value, ast.Constant):
            above, step = _path(node.value), str(ast.literal_eval(node.slice))
        case _:
            return ()
    return (*above, step) if above else ()


def _holds(op: ast.cmpop, one: Any, other: Any) -> bool:
    if isinstance(op, ast.In | ast.NotIn):
        inside = other is not None and (_has(other, one))
        return inside == isinstance(op, ast.In)
    one, other = _alike(one, other), _alike(other, one)
    if isinstance(op, EQUAL):
        return bool(one == other)
    if isinstance(op, DIFFERENT):
        return bool(one != other)
    return one is not None and other is not None and ORDERS[type(op)](one, other)


def _has(values: Any, one: Any) -> bool:
    if isinstance(values, list | tuple | set):
        return any(_alike(one, own) == _alike(own, one) for own in values)
    return one in values


def _alike(value: Any, beside: Any) -> Any:
    """A value as it is compared: text as the number or truth value that it says, where it stands beside one."""
    if isinstance(value, str) and isinstance(beside, bool):
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    if isinstance(value, str) and isinstance(beside, int | float):
        try:
            return float(value)
        except ValueError:
            return value
    return str(value) if isinstance(beside, str) and hasattr(value, "isoformat") else value
