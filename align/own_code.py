"""Functions of a user's own, which a recipe names as `file.py:function`."""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from align.errors import UserError


def names_a_function(place: str) -> str:
    """A validator of recipe keys; nothing is read yet.

    Raises:
        ValueError: it is not of the form file.py:function.
    """
    if not re.fullmatch(r".+\.py:[^\W\d]\w*", place):
        raise ValueError(f"{place!r} is not of the form file.py:function")
    return place


def load_function(place: str) -> Callable[..., Any]:
    """The function that `file.py:function` names. Runs the file's code, once in a process.

    Raises:
        UserError: there is no such file or function, or its code fails.
    """
    file, _, name = place.rpartition(":")
    found = getattr(_module(Path(file).resolve(), file_digest(place)), name, None)
    if not callable(found):
        raise UserError(f"{place}: the file has no function `{name}`")
    return found


def file_digest(place: str) -> str:
    """A digest of the file that `file.py:function` names, not of what it imports.

    Raises:
        UserError: there is no such file.
    """
    file = place.rpartition(":")[0]
    try:
        return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise UserError(f"{place}: cannot read {file} ({error.strerror}); a path is from the current folder") from None


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
