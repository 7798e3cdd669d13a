"""Functions of a user's own: a recipe names them as `file.py:function`, Python code also gives them as objects."""

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from align.errors import UserError

GIVEN = "<given>"
"""Stands for the file of a function that was given as an object."""
_given: dict[str, Callable[..., Any]] = {}


def names_a_function(place: str) -> str:
    """A validator of recipe keys; nothing is read yet.

    Raises:
        ValueError: it is not of the form file.py:function.
    """
    if not is_of_a_file(place) and not is_object(place):
        raise ValueError(f"{place!r} is not of the form file.py:function")
    return place


def names_a_class(place: str) -> str:
    """The same for `file.py:Class` or `module:Class`."""
    if not is_of_a_file(place) and not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", place):
        raise ValueError(f"{place!r} is not of the form file.py:Class or module:Class")
    return place


def is_of_a_file(place: str) -> bool:
    """Whether it is `file.py:name`, and no module's name."""
    return re.fullmatch(r".+\.py:[^\W\d]\w*", place) is not None


def is_object(place: str) -> bool:
    """Whether it stands for a function that was given as an object: nothing is imported for it."""
    return place.startswith(f"{GIVEN}:")


def give(function: Callable[..., Any]) -> str:
    """What a recipe calls a function that is an object; it can be loaded by that in this process alone."""
    place = f"{GIVEN}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    _given[place] = function
    return place


def load_named(place: str) -> Any:
    """What `file.py:Class` or `module:Class` names; a module is looked for in the current folder too.

    Raises:
        UserError: there is no such file, module or class, or its code fails.
    """
    if is_of_a_file(place):
        return load_function(place)
    module, _, name = place.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # the current folder, which a console script does not look into
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{place}: there is no such class ({error}); name it module:Class or file.py:Class") from None
    except Exception as error:
        raise UserError(f"{place}: the module's code fails with {type(error).__name__}: {error}") from error


def load_function(place: str) -> Callable[..., Any]:
    """The function that `file.py:function` names. Runs the file's code, once in a process.

    Raises:
        UserError: there is no such file or function, or its code fails.
    """
    if is_object(place):
        return _object(place)
    file, _, name = place.rpartition(":")
    found = getattr(_module(Path(file).resolve(), file_digest(place)), name, None)
    if not callable(found):
        raise UserError(f"{place}: the file has no function `{name}`")
    return found


def parameters(place: str) -> frozenset[str]:
    """Names of what the function that `file.py:function` names takes, found without running the file's code.

    Empty where the file has no such `def`; loading the function says what is wrong.
    """
    if place in _given:
        return frozenset(inspect.signature(_given[place]).parameters)
    file, _, name = place.rpartition(":")
    try:
        body = ast.parse(Path(file).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    found = [node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    return frozenset(a.arg for args in found for a in (*args.posonlyargs, *args.args, *args.kwonlyargs))


def own_options(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """A function's keywords: a section's keys that are not ours, and what stands below its `options`.

    Raises:
        UserError: `options` is no mapping, or names what stands beside it.
    """
    options = dict(extra or {})
    below = options.pop("options", {})
    if not isinstance(below, Mapping) or not all(isinstance(name, str) for name in below):
        raise UserError(f"options: {below!r} is no mapping of a function's keywords; write `options: {{name: value}}`")
    if twice := sorted(options.keys() & below.keys()):
        raise UserError(f"options: `{twice[0]}` stands beside it too; give it once")
    return options | dict(below)


def file_digest(place: str) -> str:
    """A digest of the file that `file.py:function` names, not of what it imports.

    Raises:
        UserError: there is no such file.
    """
    if is_object(place):
        return object_digest(_object(place))
    file = place.rpartition(":")[0]
    try:
        return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise UserError(f"{place}: cannot read {file} ({error.strerror}); a path is from the current folder") from None


def object_digest(own: Any) -> str:
    """A digest of an object's source, or of its class's where it is no function; not of what it refers to."""
    code = own if inspect.isroutine(own) or inspect.isclass(own) else type(own)
    try:
        text = inspect.getsource(code).encode()
    except (OSError, TypeError):  # typed in, or built in
        text = getattr(getattr(code, "__code__", None), "co_code", repr(code).encode())
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _object(place: str) -> Callable[..., Any]:
    if place not in _given:
        name = place.removeprefix(f"{GIVEN}:")
        raise UserError(
            f"{name} was given to align.Trainer as an object, so only code that gives it again has it; commands use "
            f"what stands in a file: `function: file.py:{name.rpartition('.')[2]}`"
        )
    return _given[place]


@cache
def _module(path: Path, digest: str) -> ModuleType:
    name = f"align_own_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, for one, look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path.name}: its code fails with {type(error).__name__}: {error}") from error
    return module
