"""Files and folders that are written whole or not at all, through a power cut too, and read with a sentence where they
are damaged."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import UserError

NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""What file systems answer that cannot be told to put a folder's names on the disk."""

REMOVED = ".removed"
"""Ending of a folder that is being removed."""


def read_json(path: Path) -> Any:
    """What a JSON file of a run or an adapter holds.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not valid JSON ({error}); restore the file, or start anew") from None


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """What a JSON file of a run or an adapter holds under its keys.

    Args:
        keys: that it has to have.

    Raises:
        UserError: it is damaged.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, it holds no keys; restore the file, or start anew")
    if missing := [key for key in keys if key not in value]:
        raise UserError(f"{path}: damaged, it lacks `{missing[0]}`; restore the file, or start anew")
    return value


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """The whole text or, after a kill, the old file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path` when it is whole and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, `partial_folder(path)`, that becomes `path` when all in it is written and on the disk.

    A kill between the two renames at its end leaves no `path`; the old folder then makes room when it is next written.
    """
    temporary = partial_folder(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    settle(temporary)
    old = _aside(path)
    os.rename(temporary, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, such that a kill leaves the whole of it under its name, or nothing."""
    shutil.rmtree(_aside(path), ignore_errors=True)


def forget_removed(folder: Path) -> None:
    """Remove what a kill left of folders in this one that were being removed or replaced."""
    for left in folder.glob(f".*{REMOVED}"):
        shutil.rmtree(left, ignore_errors=True)


def _aside(path: Path) -> Path:
    """Where a folder, if it is there, stands after one rename, to be removed piece by piece."""
    aside = path.with_name(f".{path.name}{REMOVED}")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        os.rename(path, aside)
    return aside


def partial_folder(path: Path) -> Path:
    """Where `replaced_folder` lets a folder be filled."""
    return path.with_name(f".{path.name}.partial")


def settle(folder: Path) -> None:
    """Put a folder's files on the disk, then its names; files get the mode that the umask gave the folder.

    Libraries that write through temporary files leave them readable by their owner alone.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            give_mode(Path(place) / name, folder)
            sync(Path(place) / name)
        sync(Path(place))


def give_mode(file: Path, folder: Path) -> None:
    """Let those read and write a file who may a folder; disks on which all files have one mode are left alone."""
    mode = folder.stat().st_mode & 0o666
    if mode & ~file.stat().st_mode:
        file.chmod(mode)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def is_there(place: Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether there is such a file or folder, or one of a kind (`Path.is_file`); a name that none can have is none."""
    try:
        return kind(place)
    except (OSError, ValueError):
        return False


def with_home(path: str) -> Path:
    """A path with its `~` opened; one that names nobody's home stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
