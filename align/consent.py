"""What may run that is not Align's own. Consent is given in the call itself, never by a file that is read."""

import importlib.machinery
import logging
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from align.errors import UserError
from align.shipped import PACKAGE

TRUST, ALLOW = "--trust-remote-code", "--allow-code"
RUN_FILES = ("environment.json", "given.json", "metrics.jsonl", "events.log")
"""What lies beside the recipe.yaml of a run."""
REMOTE = "comes with Python code of its own, which is not run unasked; read it, then give --trust-remote-code"

log = logging.getLogger("align")


def check_code(named: Mapping[str, str], file: Path, *, allowed: bool) -> None:
    """Say which code a file names that will be imported; refuse it where the file need not be what this user wrote.

    Args:
        named: dotted key -> `file.py:function`, `module:function`, or what else it names.
        allowed: whether this call has consented.

    Raises:
        UserError: it comes from a run directory, from a place that others write, or names Python's own modules.
    """
    if not named:
        return
    listed = ", ".join(f"{key}: {place}" for key, place in named.items())
    reason = not_own(file) or next(filter(None, map(_of_python, named.values())), None)
    if reason and not allowed:
        raise UserError(f"{file}: names code to run ({listed}), and {reason}; read it, then give {ALLOW} if it may run")
    say_code(named, str(file))


def say_code(named: Mapping[str, str], origin: str) -> None:
    """Say which code will be imported, and from where."""
    for key, place in named.items():
        log.warning("%s: names code that may run: %s%s (%s)", origin, place, _found_at(place), key)


def not_own(file: Path) -> str | None:
    """Why a file may say what this user did not write; None where nothing tells of that."""
    path = Path(os.path.abspath(file.expanduser())).resolve()
    if path.is_relative_to(PACKAGE.resolve()) or not path.exists():
        return None
    for folder in path.parents:
        if (folder / "recipe.yaml").is_file() and any((folder / name).exists() for name in RUN_FILES):
            return f"{folder} is a run directory, whose recipe somebody else may have written"
    for place in (path, path.parent):
        found = place.stat()
        if hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0):
            return f"{place} belongs to another user"
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            return f"everyone on this machine can write {place}"
    return None


def _of_python(place: str) -> str | None:
    """`os:popen` and the like: no module that anybody writes a reward in."""
    module = place.split(":")[0].split(".")[0]
    known = module in sys.stdlib_module_names and not place.split(":")[0].endswith(".py")
    return f"`{module}` is Python's own module, not one of yours" if known else None


def _found_at(place: str) -> str:
    """Where a module:function will be imported from, found without importing anything; empty for a file."""
    top = place.split(":")[0].split(".")[0]
    if place.split(":")[0].endswith(".py") or ":" not in place:
        return ""
    if top in sys.stdlib_module_names:
        return ", of Python itself"
    spec = importlib.machinery.PathFinder.find_spec(top, [*sys.path, ""])
    return f" from {spec.origin or next(iter(spec.submodule_search_locations or ()), '')}" if spec else ""
