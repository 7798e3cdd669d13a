"""Preparations on disk: under a key of all that they depend on, whole or absent, and checked before they are used."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets

from align.files import replaced, sync
from align.locks import in_turn
from align.manifest import Damaged, check, file_digest, seal

UNUSED = 30 * 24 * 3600
"""Seconds after which a preparation that nobody has used makes room."""

log = logging.getLogger("align")
_of_this_process: list[TemporaryDirectory[str]] = []


def kept_root() -> Path:
    """Where preparations are: in the cache of `datasets` (`HF_DATASETS_CACHE`), which may be removed at any time."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "align" / "prepared"


def kept_folder(key_of: Callable[[], str | None], fill: Callable[[Path], None]) -> Path:
    """The folder of a preparation: one that is there and whole, or a new one.

    Processes that want the same wait for the first. What is damaged is said, removed and made again.

    Args:
        key_of: a digest of all that it depends on; None for what cannot be kept, which is gone with this process.
        fill: writes the files into an empty folder.
    """
    root, key = kept_root(), key_of()
    root.mkdir(parents=True, exist_ok=True)
    if key is None:
        return _unkept(root, fill)
    folder, temporary = root / key, root / f"{key}.tmp"
    with in_turn(root / f"{key}.lock", work="prepares the same rows"):
        if folder.exists():
            try:
                check(folder)
            except Damaged as problem:
                log.warning("%s is damaged (%s); it is removed, and the rows are prepared again", folder, problem)
                shutil.rmtree(folder)
            else:
                os.utime(folder)
                return folder
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        _forget_unused(root)
        temporary.mkdir()
        try:
            fill(temporary)
            if key_of() != key:
                log.warning("the rows' files, or a date in the chat template, changed meanwhile; this is not kept")
                return _unkept(root, lambda place: shutil.copytree(temporary, place, dirs_exist_ok=True))
            seal(temporary)
            os.replace(temporary, folder)
            sync(root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def _unkept(root: Path, fill: Callable[[Path], object]) -> Path:
    own = TemporaryDirectory(dir=root, prefix="unkept-")
    _of_this_process.append(own)
    fill(Path(own.name))
    return Path(own.name)


def _forget_unused(root: Path) -> None:
    for folder in root.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > UNUSED:
            shutil.rmtree(folder, ignore_errors=True)


def known_digest(file: Path) -> str:
    """A file's digest; it is read only where its size, its times or its place on the disk are others than last time.

    A file that was written within two seconds before it was last read is read again, since a change then may have left
    no trace in its times.
    """
    index = kept_root().parent / "files.json"
    path, now = str(file.resolve()), time.time_ns()
    about = file.stat()
    seen = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    known = _index(index).get(path)
    if known and known[:4] == seen and max(seen[1:3]) < known[4] - 2_000_000_000:
        return str(known[5])
    digest = file_digest(file)
    with in_turn(index.with_suffix(".lock"), work="notes digests of files"), replaced(index) as temporary:
        others = {name: own for name, own in _index(index).items() if Path(name).exists()}
        temporary.write_text(json.dumps(others | {path: [*seen, now, digest]}), encoding="utf-8")
    return digest


def _index(file: Path) -> dict[str, list[Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
