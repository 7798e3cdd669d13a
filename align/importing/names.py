"""Names of a Python script and what it sets them to: variables, options of the command line, arguments of functions."""

import ast
from typing import Any


def assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """Names -> what they are set to, where all of the script sets them to one thing; the last of a chain wins."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value: Any = getattr(node, "value", None)
        for target in targets if value is not None else ():
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            paired = isinstance(value, ast.Tuple) and isinstance(target, ast.Tuple)
            for place, name in enumerate(names):
                if isinstance(name, ast.Name):
                    own = value.elts[place] if paired and place < len(value.elts) else value
                    found.setdefault(name.id, []).append(own)
    return {name: _chosen(name, values) for name, values in found.items()}


def is_unknown(value: ast.expr) -> bool:
    """Whether a name is set to several things, or to something made of itself alone."""
    return isinstance(value, ast.Name) and " (set " in value.id


def _chosen(name: str, values: list[ast.expr]) -> ast.expr:
    """Of several values the one that is not made of the name itself, where the others are; else none."""
    own = [value for value in values if name in {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}]
    first = [value for value in values if value not in own]
    same = {ast.unparse(value) for value in first}
    if len(same) == 1:
        calls = [value for value in own if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)]
        return _chained(name, first[0], calls)
    return ast.Name(id=f"{name} (set {len(values)} times)", ctx=ast.Load())


def _chained(name: str, first: ast.expr, calls: list[ast.Call]) -> ast.expr:
    """`x = f(); x = x.map(g)` as `f().map(g)`: what is done to rows is said."""
    for call in calls:
        if isinstance(call.func, ast.Attribute):
            base = call.func.value
            if isinstance(base, ast.Name) and base.id == name:
                attribute = ast.Attribute(value=first, attr=call.func.attr, ctx=ast.Load())
                first = ast.copy_location(ast.Call(func=attribute, args=call.args, keywords=call.keywords), call)
    return first


def options(tree: ast.Module) -> dict[str, ast.expr]:
    """Options of argparse -> their defaults, of those that have one."""
    found: dict[str, ast.expr] = {}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or called(call) != "add_argument":
            continue
        flags = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        long = next((flag for flag in flags if flag.startswith("--")), flags[0] if flags else "")
        name = getattr(named.get("dest"), "value", None) or long.lstrip("-").replace("-", "_")
        action = getattr(named.get("action"), "value", None)
        switched = {"store_true": False, "store_false": True}.get(action) if isinstance(action, str) else None
        if "default" in named:
            found[name] = named["default"]
        elif switched is not None:
            found[name] = ast.Constant(value=switched)
    return found


def parameters(tree: ast.Module) -> dict[str, ast.expr]:
    """Arguments of the script's functions -> what all of its calls give them, or their default."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found: dict[str, list[ast.expr]] = {}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        own = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == function.name]
        names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        last = function.args.defaults
        defaults = dict(zip(names[len(names) - len(last) :], last, strict=True)) if last else {}
        defaults |= {a.arg: d for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if d}
        for name in (*names, *(argument.arg for argument in function.args.kwonlyargs)):
            given = [_given(call, name, names) or defaults.get(name) for call in own] or [defaults.get(name)]
            found.setdefault(name, []).extend(
                one for one in given if one is not None and not (isinstance(one, ast.Name) and one.id == name)
            )
    return {name: values[0] for name, values in found.items() if len({ast.unparse(value) for value in values}) == 1}


def _given(call: ast.Call, name: str, names: list[str]) -> ast.expr | None:
    named = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    place = names.index(name) if name in names else len(call.args)
    return named or (call.args[place] if place < len(call.args) else None)


def called(call: ast.Call) -> str:
    """The last name of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
