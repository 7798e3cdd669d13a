"""Rows from files, folders and the hub."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

from align.data.files import SUFFIXES, Record, choose_split, file_records, is_split
from align.data.formats import read_row
from align.data.schema import BadRow, Row, UnusableRow, malformed
from align.errors import UserError

STATE, DICTIONARY = "state.json", "dataset_dict.json"
"""Files by which `save_to_disk` marks a data set, and one of several splits."""
BOOKKEEPING = (STATE, DICTIONARY, "dataset_info.json", "dataset_infos.json")
SHARD = re.compile(r"[-_.](?:(?:part|shard|chunk)[-_.]?)?\d+(?:[-_.]of[-_.]\d+)?(?:[-_.][0-9a-f]{16,})?$", re.I)
"""What a shard's name ends with: `-00000-of-00001-3d4cd8309148a71f`, `_part_3`, `.0`."""


@dataclass(frozen=True)
class Source:
    """Where rows come from, and their share of the mixture."""

    path: str
    split: str | None = None
    weight: float = 1.0
    revision: str | None = None


@dataclass(frozen=True)
class StreamedRow:
    """One row of a source."""

    source: str
    """The file, or the hub name."""
    number: int
    """Its place there, from 1."""
    raw: object
    """The object as the file holds it; the line's text where it is no JSON."""
    row: Row | BadRow | UnusableRow
    """The checked row, or why there is none."""


@dataclass(frozen=True)
class SourceRows:
    """What one source gave."""

    rows: list[Row]
    read: int
    refused: dict[str, int]
    """How many rows nothing can be learnt from, by reason."""
    ignored: dict[str, int]
    """How many rows had a column that is ignored by request, by its name."""


def read_source(
    path: str,
    *,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    ignore: Sequence[str] = (),
    read_one: Callable[..., Row] = read_row,
) -> SourceRows:
    """All rows of a file, a folder of files, or a hub data set.

    Args:
        path: a .jsonl, .jsonl.gz, .json, .parquet or .arrow file, a folder of them, or a hub name.
        split: split of a hub data set (by default train), or of a folder or JSON file that holds several.
        revision: of a hub data set.
        limit: at most this many rows are read.
        ignore: columns that count as absent; `items[].model` names a key of a list's objects.
        read_one: `read_row`, or `read_prompt` where the prompts alone count.

    Returns:
        The rows in file order, how many were read, and how many cannot be used, by reason.

    Raises:
        UserError: nothing to read at that path, or a malformed row: its place, what is wrong, the remedy, and how
            many more there are.
    """
    rows: list[Row] = []
    refused: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    bad: list[str] = []
    read = 0
    for record in islice(stream_rows(path, split=split, revision=revision, ignore=ignore, read_one=read_one), limit):
        read += 1
        ignored.update(name for name in ignore if isinstance(record.raw, dict) and name.split("[].")[0] in record.raw)
        match record.row:
            case BadRow() as error:
                bad.append(error.message(record.source, record.number))
            case UnusableRow() as reason:
                refused[str(reason)] += 1
            case row:
                rows.append(row)
    if bad:
        raise malformed(bad)
    if not read:
        raise UserError(f"{path}: no rows; give a source that holds some")
    return SourceRows(rows=rows, read=read, refused=dict(refused), ignored=dict(ignored))


def stream_rows(
    path: str,
    *,
    split: str | None = None,
    revision: str | None = None,
    ignore: Sequence[str] = (),
    read_one: Callable[..., Row] = read_row,
) -> Iterator[StreamedRow]:
    """What `read_source` reads, one row at a time, the malformed ones among them.

    Raises:
        UserError: nothing can be read at that path, or from some place on.
    """
    for file, number, raw in records(path, split=split, revision=revision):
        row: Row | BadRow | UnusableRow
        try:
            row = raw if isinstance(raw, BadRow) else read_one(raw, file, number, ignore=ignore)
        except (BadRow, UnusableRow) as error:
            row = error
        yield StreamedRow(file, number, row.raw if row is raw and isinstance(row, BadRow) else raw, row)


def records(path: str, *, split: str | None = None, revision: str | None = None) -> Iterator[Record]:
    """The objects of a file, a folder or a hub data set as they stand there, unchecked.

    Raises:
        UserError: nothing can be read at that path, or from some place on.
    """
    place = Path(path).expanduser()
    if revision is not None and place.exists():
        raise UserError(f"{path}: is on this machine, and `revision` is of a hub data set; leave it out")
    if place.is_dir():
        yield from _folder_records(place, split)
    elif place.exists():
        if not path.endswith(SUFFIXES):
            raise UserError(f"{path}: not a file that holds rows; known endings are {', '.join(SUFFIXES)}")
        yield from file_records(place, split=split)
    else:
        yield from _hub_records(path, split, revision)


def _folder_records(folder: Path, split: str | None) -> Iterator[Record]:
    """Rows of all files of a folder, or of one split of it; what `save_to_disk` writes is such a folder."""
    files = sorted(file for file in folder.rglob("*") if _holds_rows(file, folder))
    if not files:
        raise UserError(
            f"{folder}: no file with one of the endings {', '.join(SUFFIXES)}; give a folder that holds some"
        )
    splits = {file: _split_name(file, folder) for file in files}
    names = sorted(set(splits.values()))
    of_splits = any(map(is_split, names)) or (folder / DICTIONARY).exists()
    if split is not None or (len(names) > 1 and of_splits):
        wanted = choose_split(folder, names, split)
        files = [file for file in files if splits[file] in wanted]
    for file in files:
        yield from file_records(file)


def _holds_rows(file: Path, folder: Path) -> bool:
    """Whether a file is one of rows: not hidden, and neither the records nor the caches that `datasets` keeps."""
    hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    kept = file.name in BOOKKEEPING or (file.name.startswith("cache-") and file.suffix == ".arrow")
    return file.name.endswith(SUFFIXES) and not hidden and not kept and file.is_file()


def _split_name(file: Path, folder: Path) -> str:
    """The file's stem without a shard's number and hash; its folder's name where only that is a split's."""
    stem = SHARD.sub("", file.name.removesuffix(".gz").rsplit(".", 1)[0])
    folders = file.relative_to(folder).parts[:-1]
    if is_split(stem):
        return stem
    if folders and (file.parent / STATE).exists():
        return folders[-1]
    return next((name for name in reversed(folders) if is_split(name)), stem)


def _hub_records(path: str, split: str | None, revision: str | None) -> Iterator[Record]:
    if path.endswith(SUFFIXES) or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"{path}: no such file{_nearest(Path(path))}")
    try:
        rows = load_dataset(path, split=split or "train", revision=revision)
    except DatasetNotFoundError as error:
        raise UserError(
            f"{path}: neither a local file{_nearest(Path(path))} nor a data set on the hub ({error})"
        ) from None
    except (ConnectionError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: no such local file{_nearest(Path(path))}, and the hub data set cannot be loaded ({error})"
        ) from None
    for number, raw in enumerate(rows, start=1):
        yield path if split is None else f"{path} [{split}]", number, raw


def _nearest(path: Path) -> str:
    """A hint at the existing file with the most similar name, or nothing."""
    folder = path.expanduser().parent
    if not folder.is_dir():
        return f" (no folder {folder} either)"
    close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f" (did you mean {folder / close[0]}?)" if close else ""
