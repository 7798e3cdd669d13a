"""A folder's manifest: size and digest of every file, written last, so that a part is never taken for the whole."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from align.files import settle, write_json

MANIFEST = "manifest.json"
THREADS = 4
"""Files whose digests are taken at once; hashlib lets threads run beside each other."""


class Damaged(ValueError):
    """A folder is not as it was written; the message says which file."""


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, read piece by piece."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, about: dict[str, Any] | None = None) -> None:
    """Put a folder's files on the disk and, when they are there, its manifest.

    Args:
        about: what else the manifest says of the folder.
    """
    settle(folder)
    names = _names(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(file_digest, [folder / name for name in names]))
    files = {name: [(folder / name).stat().st_size, digest] for name, digest in zip(names, digests, strict=True)}
    value = {"about": about or {}, "files": files}
    write_json(folder / MANIFEST, value | {"digest": json_digest(value)}, indent=1)


def check(folder: Path) -> dict[str, Any]:
    """Read every file of a sealed folder against its manifest; what the manifest says besides.

    Raises:
        Damaged: names the file.
    """
    about, files = _read(folder / MANIFEST)
    for name, (size, _) in files.items():
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing")
        if file.stat().st_size != size:
            raise Damaged(f"{file}: damaged, it has {file.stat().st_size} bytes and was written with {size}")
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(_digest_of, [folder / name for name in files])
        for (name, (_, written)), digest in zip(files.items(), digests, strict=True):
            if digest != written:
                raise Damaged(f"{folder / name}: damaged, it is not as it was written")
    return about


def _digest_of(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise Damaged(f"{file}: cannot be read ({error.strerror})") from None


def _read(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if value.pop("digest") != json_digest(value):
            raise ValueError("its digest is another one")
        return value["about"], value["files"]
    except FileNotFoundError:
        raise Damaged(f"{file} is missing, so it was not written to its end") from None
    except OSError as error:
        raise Damaged(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file}: damaged ({error})") from None


def _names(folder: Path) -> list[str]:
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(str(file.relative_to(folder)) for file in found if file != folder / MANIFEST)
