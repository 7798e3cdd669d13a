"""What the expressions of a Python script are worth, as far as reading can tell: nothing of it is run.

A name is worth what the whole script sets it to, where that is one thing; a function's argument what it is called with,
or its default; an option of the command line its default; a name of a file beside the script what it is set to there.
"""

import ast
import math
import operator
from pathlib import Path
from typing import Any, NamedTuple

from align.bounds import parse_python
from align.importing.names import assigned, called, is_unknown, options, parameters

OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: lambda base, power: base**power if abs(base) < 1000 and abs(power) < 100 else float("nan"),
}
COMPARISONS: dict[type, Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
DIVIDING = (ast.Div, ast.FloorDiv)
ENUMS = {"TaskType": str.upper, "IntervalStrategy": str.lower, "SchedulerType": str.lower, "SaveStrategy": str.lower}
"""Classes whose members are texts, and how the text of a member is written."""
DEVICE = ("is_bfloat16_supported()", "is_bf16_supported()", "torch.cuda.is_available()")
"""What a script asks of the machine; it is imported as for one where that holds."""
ENVIRONMENT = ("os.environ.get(", "os.getenv(", "environ.get(", "getenv(")
NUMBERS: dict[str, Any] = {"int": int, "float": float}
TEXTS = ("str", "Path", "PosixPath")
PARSES = ("parse", "get_arg")
"""How the names of functions begin that give what the command line was read into."""
DEPTH = 25


class Unread(NamedTuple):
    """A value that only running the script could tell."""

    source: str


class Values:
    """Of one script."""

    def __init__(self, tree: ast.Module, file: Path, *, follow: bool = True) -> None:
        """Args:
        file: where it stands.
        follow: whether the files beside it are read that it imports; they are read for themselves.
        """
        self.names = assigned(tree)
        self.options = options(tree)
        self.parsing = {
            f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and "parse_args" in ast.unparse(f)
        }
        """Functions of the script's own that read the command line."""
        self.defaulted: set[str] = set()
        """Options of the command line whose default was taken."""
        for name, value in parameters(tree).items():
            if name not in self.names or is_unknown(self.names[name]):
                self.names[name] = value
        self.modules = _modules(tree, file.parent) if follow else {}
        for name, value in (_imported(tree, file.parent) if follow else {}).items():
            self.names.setdefault(name, value)

    def of(self, node: ast.expr | None, depth: int = 0) -> Any:
        """The value of an expression; Unread where only running could tell."""
        if node is None or depth > DEPTH:
            return Unread("")
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError):
            pass
        match node:
            case ast.Name(id=name) if name in self.names:
                return self.of(self.names[name], depth + 1)
            case ast.Attribute():
                return self._attribute(node, depth)
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                values = [self.of(part, depth + 1) for part in parts]
                return Unread(ast.unparse(node)) if any(isinstance(value, Unread) for value in values) else values
            case ast.Dict(keys=keys) if all(isinstance(key, ast.Constant) for key in keys):
                names = [key.value for key in keys]  # type: ignore[union-attr]
                return dict(zip(names, (self.of(value, depth + 1) for value in node.values), strict=True))
            case ast.Subscript():
                return self._item(node, depth)
        return self._computed(node, depth)

    def _attribute(self, node: ast.Attribute, depth: int) -> Any:
        whole = ast.unparse(node)
        owner, _, member = whole.rpartition(".")
        kind = owner.rpartition(".")[2]
        if whole.startswith("torch."):
            return node.attr
        if kind in ENUMS:
            return ENUMS[kind](member)
        if owner in self.modules:
            return self.modules[owner].of(ast.Name(id=member, ctx=ast.Load()), depth + 1)
        if self.options and isinstance(node.value, ast.Name) and self._is_parsed(node.value.id):
            default = self.options.get(member)
            if default is not None:
                self.defaulted.add(member)
                return self.of(default, depth + 1)
        return Unread(whole)

    def _is_parsed(self, name: str) -> bool:
        """Whether a name is what the command line was read into."""
        value = self.names.get(name)
        if isinstance(value, ast.Tuple) and value.elts:
            value = value.elts[0]
        if value is None:
            return name in ("args", "opt", "opts", "options")
        if isinstance(value, ast.Call) and called(value) in self.parsing:
            return True
        return isinstance(value, ast.Call) and called(value).startswith(PARSES)

    def _item(self, node: ast.Subscript, depth: int) -> Any:
        owner, key = self.of(node.value, depth + 1), self.of(node.slice, depth + 1)
        if isinstance(owner, dict) and isinstance(key, str) and key in owner:
            return owner[key]
        return Unread(ast.unparse(node))

    def _computed(self, node: ast.expr, depth: int) -> Any:
        """The value of arithmetic, of texts put together, and of what a script asks of the machine."""
        unread = Unread(ast.unparse(node))
        match node:
            case ast.BinOp(op=operation) if type(operation) in OPERATIONS:
                return self._arithmetic(node, depth)
            case ast.UnaryOp(op=ast.Not()):
                inner = self.of(node.operand, depth + 1)
                return unread if isinstance(inner, Unread) else not inner
            case ast.BoolOp(op=operation, values=sides):
                return self._first(sides, depth, wanted=isinstance(operation, ast.Or))
            case ast.Compare(ops=[operation], comparators=[other]) if type(operation) in COMPARISONS:
                return self._compared(COMPARISONS[type(operation)], [node.left, other], depth)
            case ast.IfExp():
                test = self.of(node.test, depth + 1)
                return unread if isinstance(test, Unread) else self.of(node.body if test else node.orelse, depth + 1)
            case ast.JoinedStr():
                parts = [self.of(p.value if isinstance(p, ast.FormattedValue) else p, depth + 1) for p in node.values]
                return unread if any(isinstance(part, Unread) for part in parts) else "".join(map(str, parts))
            case ast.Call():
                return self._call(node, depth)
        return unread

    def _first(self, sides: list[ast.expr], depth: int, *, wanted: bool) -> Any:
        """Of `and` or `or` the first value that decides it, or the last."""
        for side in sides:
            value = self.of(side, depth + 1)
            if isinstance(value, Unread) or bool(value) is wanted:
                return value
        return value

    def _compared(self, compare: Any, sides: list[ast.expr], depth: int) -> Any:
        values = [self.of(side, depth + 1) for side in sides]
        try:
            unread = any(isinstance(value, Unread) for value in values)
            return Unread(" and ".join(map(ast.unparse, sides))) if unread else compare(*values)
        except TypeError:
            return Unread(" and ".join(map(ast.unparse, sides)))

    def _arithmetic(self, node: ast.BinOp, depth: int) -> Any:
        sides = [self.of(side, depth + 1) for side in (node.left, node.right)]
        if all(isinstance(side, int | float) for side in sides) and (sides[1] or type(node.op) not in DIVIDING):
            return _number(node, *sides)
        if all(isinstance(side, str) for side in sides):
            if isinstance(node.op, ast.Add):
                return sides[0] + sides[1]
            if isinstance(node.op, ast.Div):  # of paths
                return str(Path(sides[0], sides[1]))
        return Unread(ast.unparse(node))

    def _call(self, node: ast.Call, depth: int) -> Any:
        whole = ast.unparse(node)
        if whole.endswith(DEVICE):
            return True
        parts = [self.of(arg, depth + 1) for arg in node.args]
        if whole.startswith(ENVIRONMENT) and len(parts) == 2:  # what it is where nobody sets the variable
            return parts[1]
        if called(node) in NUMBERS and len(parts) == 1 and isinstance(parts[0], str | int | float):
            return _converted(NUMBERS[called(node)], parts[0], whole)
        texts = parts and all(isinstance(part, str) for part in parts) and not node.keywords
        if texts and (called(node) in TEXTS or whole.startswith("os.path.join(")):
            return str(Path(*parts)) if called(node) != "str" else parts[0]
        return Unread(whole)


def _number(node: ast.BinOp, left: float, right: float) -> Any:
    """What arithmetic comes to; Unread where that is no number that float64 holds."""
    try:
        value = OPERATIONS[type(node.op)](left, right)
        return value if math.isfinite(value) else Unread(ast.unparse(node))
    except (ArithmeticError, TypeError):  # beyond float64, or complex
        return Unread(ast.unparse(node))


def plain(value: Any) -> Any:
    """A value, or None where only running could tell."""
    return None if isinstance(value, Unread) else value


def _converted(to: Any, value: Any, source: str) -> Any:
    try:
        return to(value)
    except (ValueError, OverflowError):
        return Unread(source)


def _beside(folder: Path, module: str) -> tuple[ast.Module, Path] | None:
    """A module that is a file beside the script."""
    file = folder / f"{module.replace('.', '/')}.py"
    try:
        return parse_python(file.read_text(encoding="utf-8")), file
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _modules(tree: ast.Module, folder: Path) -> dict[str, "Values"]:
    """Modules beside the script by the names that it knows them under."""
    found = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import) else ():
            if there := _beside(folder, alias.name):
                found[alias.asname or alias.name] = Values(*there, follow=False)
    return found


def _imported(tree: ast.Module, folder: Path) -> dict[str, ast.expr]:
    """Names that the script takes out of modules beside it -> literals."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        there = _beside(folder, node.module) if isinstance(node, ast.ImportFrom) and node.module else None
        if there is None or not isinstance(node, ast.ImportFrom):
            continue
        values = Values(*there, follow=False)
        for alias in node.names:
            value = values.of(ast.Name(id=alias.name, ctx=ast.Load()))
            if not isinstance(value, Unread):
                found[alias.asname or alias.name] = ast.parse(repr(value), mode="eval").body
    return found
