"""What can happen to a file: the ways in which the tests of faults damage one, and a run's files to damage."""

import ctypes
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def missing(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def truncated(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flipped(file: Path, place: float = 0.5) -> None:
    """One bit, of a byte at this share of the file."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def folder(file: Path) -> None:
    """A folder in its place."""
    file.unlink()
    file.mkdir()


def unreadable(file: Path) -> None:
    file.chmod(0)


HARMS: dict[str, Callable[[Path], None]] = {
    own.__name__: own for own in (missing, empty, truncated, flipped, folder, unreadable)
}
READ_ALL = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


@contextmanager
def as_a_plain_user() -> Iterator[None]:
    """Inside, root too is held to what files allow."""
    libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(0x20080522, 0), (_Sets * 2)()
    if libc.capget(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capget")
    before = sets[0].effective
    sets[0].effective &= ~READ_ALL
    try:
        if libc.capset(ctypes.byref(header), sets):
            raise OSError(ctypes.get_errno(), "capset")
        yield
    finally:
        sets[0].effective = before
        libc.capset(ctypes.byref(header), sets)


def files_of(run: Path) -> list[str]:
    """Every file below a run, by its path in it."""
    return sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file() and file.name != ".lock")


def restore(source: Path, run: Path) -> None:
    """Put a run back as it was."""
    for file in run.rglob("*") if run.exists() else ():
        file.chmod(0o700)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(source, run)
