"""What the system lacks or refuses (disk, quota, files, folders, threads), in one sentence: the one table of it.

Libraries hide an error's number in words of their own, so the words are looked for too, along the chain of causes.
"""

import errno
from collections.abc import Iterator
from typing import NamedTuple

GOES_ON = "and the same command goes on"


class Lack(NamedTuple):
    """A kind of error."""

    numbers: tuple[int, ...]
    said: tuple[str, ...]
    """What libraries say of it; Rust's write the number into their words."""
    sentence: str
    """With {place} and {why}."""


LACKS = (
    Lack(
        (errno.ENOSPC,),
        ("No space left on device", "os error 28)", "database or disk is full"),
        "{place}: no space is left; make room, " + GOES_ON,
    ),
    Lack(
        (errno.EDQUOT,),
        ("Disk quota exceeded", "os error 122)"),
        "{place}: the disk quota is used up; remove files of yours or ask for a larger one, " + GOES_ON,
    ),
    Lack(
        (errno.EFBIG,),
        ("File too large", "os error 27)"),
        "{place}: the file may not become so large; raise the limit (`ulimit -f`), " + GOES_ON,
    ),
    Lack(
        (errno.EROFS,),
        ("Read-only file system", "os error 30)"),
        "{place}: the file system can only be read; give a path that can be written",
    ),
    Lack(
        (errno.EMFILE, errno.ENFILE),
        ("Too many open files", "os error 24)", "received 0 items of ancdata"),
        "too many files are open; raise the limit (`ulimit -n 65536`), " + GOES_ON,
    ),
    Lack(
        (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENXIO),
        ("Input/output error", "Stale file handle", "os error 5)", "os error 116)", "disk I/O error"),
        "{place}: the disk, or the network to it, fails ({why}); when it is back the same command goes on",
    ),
    Lack(
        (),
        ("No usable temporary directory",),
        "no folder for temporary files can be written; set TMPDIR to one that can, " + GOES_ON,
    ),
    Lack(
        (),
        ("Could not determine home directory",),
        "there is no home folder; set HOME to a folder that can be written, " + GOES_ON,
    ),
    Lack(
        (errno.ENOMEM,),
        (),
        "out of memory ({why}); free some, " + GOES_ON,
    ),
    Lack(
        (errno.EAGAIN,),
        ("can't start new thread", "Resource temporarily unavailable"),
        "no more processes or threads may be started; raise the limit (`ulimit -u`), " + GOES_ON,
    ),
    Lack(
        (),
        ("PytorchStreamWriter failed writing", "enforce fail at inline_container", "unexpected pos"),
        "a file could not be written to its end, as where the disk or a quota is full; make room, " + GOES_ON,
    ),
    Lack(
        (
            errno.EACCES,
            errno.EPERM,
            errno.EISDIR,
            errno.ENOTDIR,
            errno.ENOENT,
            errno.EEXIST,
            errno.ENAMETOOLONG,
            errno.ELOOP,
        ),
        (),
        "{place}: {why}; give a path that can be written",
    ),
)


def in_words(error: BaseException) -> str | None:
    """What to say of an error that the system has caused; None of another.

    A missing or forbidden file is one only where the error names it.
    """
    for one in _causes(error):
        for lack in LACKS:
            number = one.errno if isinstance(one, OSError) else None
            place = one.filename if isinstance(one, OSError) else None
            if lack is LACKS[-1] and place is None:
                continue
            if number in lack.numbers or any(said in str(one) for said in lack.said):
                why = getattr(one, "strerror", None) or " ".join(str(one).split())[:100]
                return lack.sentence.format(place=place or "the disk", why=why)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, each once."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
