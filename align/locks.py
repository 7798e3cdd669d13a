"""One process at a time: locks that the system takes back when their holder ends, however it ends.

Beside each lock stands who holds it: the command, the process, the machine, and since when. A disk that knows no locks,
as some networks' do not, gets a file that names its holder in their place: one whose process is gone is taken over on
the same machine, and named on another. Readers ask for no lock.
"""

import contextlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from align.errors import UserError
from align.progress import in_time, stage

LOCK = ".lock"
"""In a folder that one process works in."""
HOLDER, SOFT = ".holder", ".soft"
"""Endings of the files beside a lock: who has it, and what is held where the disk knows no locks."""
LOCK_FILES = frozenset({LOCK, LOCK + HOLDER, LOCK + SOFT})
"""What a folder may hold of them."""

log = logging.getLogger("align")


@contextmanager
def alone(folder: Path, *, instead: str) -> Iterator[None]:
    """Hold a folder, which is made, against other processes.

    Args:
        instead: what one who finds it held may do, beside waiting.

    Raises:
        UserError: another process holds it; which one, if that is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, folder / LOCK, instead):
        yield


@contextmanager
def alone_on(path: Path, *, instead: str) -> Iterator[None]:
    """As `alone`, for a file or a folder that is to be: its lock stands beside it, and goes in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}{LOCK}")
    with _alone(path, file, instead):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextmanager
def _alone(place: Path, file: Path, instead: str) -> Iterator[None]:
    lock = _take(file, wait=False)
    if lock is None:
        raise UserError(f"{place}: another process is at work here{_who(file)}; wait for its end, or {instead}")
    with _held(lock, file):
        yield


@contextmanager
def in_turn(file: Path, *, work: str) -> Iterator[None]:
    """Wait while another process does the same work, whose results this one then finds.

    Args:
        file: stands for the work; its folder is made.
        work: what the other process does, such as "tokenises these rows".
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = _take(file, wait=False)
    if lock is None:
        with stage(f"waiting for another process, which {work}{_who(file)}"):
            lock = _take(file, wait=True)
    assert lock is not None
    with _held(lock, file):
        yield


@contextmanager
def _held(lock: BaseFileLock, file: Path) -> Iterator[None]:
    """Say who has it, until it is given back."""
    holder = file.with_name(file.name + HOLDER)
    about = {"host": platform.node(), "pid": os.getpid(), "since": time.time(), "command": _command()}
    with contextlib.suppress(OSError):  # who holds it is said where that is possible; the lock counts
        holder.write_text(json.dumps(about) + "\n")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _command() -> str:
    """`align score`, or the program that has called us."""
    name = Path(sys.argv[0]).name
    return " ".join(["align", *sys.argv[1:2]]) if name in ("align", "cli.py") else name or "python"


def _who(file: Path) -> str:
    """The holder of a lock in words, and what to do if it is of another machine; empty where nobody wrote it down."""
    try:
        about = json.loads(file.with_name(file.name + HOLDER).read_text())
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(about["since"]))
        age = in_time(max(0.0, time.time() - about["since"]))
        words = f" (`{about['command']}`, process {about['pid']} on {about['host']}, since {since}: {age})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    soft = file.with_name(file.name + SOFT)
    if soft.exists() and about["host"] != platform.node():
        words += f"; if that process is gone, remove {soft}"
    return words


def _take(file: Path, *, wait: bool) -> BaseFileLock | None:
    """The lock of a file, or of what stands for it on a disk without; None where another process has it."""
    kinds: tuple[BaseFileLock, ...] = (FileLock(file), SoftFileLock(file.with_name(file.name + SOFT)))
    for lock in kinds:
        try:
            lock.acquire(blocking=wait)
            return lock
        except Timeout:
            return None
        except (OSError, NotImplementedError) as error:
            reason = error
    log.warning("%s: cannot be locked (%s); see to it that no other process works here", file, reason)
    return kinds[-1]
