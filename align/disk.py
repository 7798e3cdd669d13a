"""Before long work: the disk that it will take against what is free."""

import shutil
from pathlib import Path

from align.errors import UserError


def check_fits(place: Path, size: float, what: str, remedy: str, *, held: int = 0) -> None:
    """Refuse work whose results a disk cannot hold.

    Args:
        place: where they will be, there already or not.
        size: bytes that they will take, about.
        what: what takes them, in words.
        remedy: what a user may do besides making room.
        held: bytes of them that are there.

    Raises:
        UserError: says how much is needed, and how much is free.
    """
    have = free(place) + held
    if size > have:
        raise UserError(
            f"{place}: {what} will take about {in_words(size)}, and {in_words(have)} are free; make room, or {remedy}"
        )


def free(place: Path) -> int:
    """Bytes that are free on the disk of a file or folder, there already or not."""
    there = next(own for own in (place.absolute(), *place.absolute().parents) if own.exists())
    return shutil.disk_usage(there).free


def size_of(folder: Path) -> int:
    """Bytes of a folder's files; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def in_words(size: float) -> str:
    """Bytes, with three digits."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if size >= u or u == 1)
    return f"{size / unit:.3g} {name}"
