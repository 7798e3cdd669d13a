"""Rows from files, folders and the hub."""

import difflib
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow.parquet
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

from align.data.formats import read_row
from align.data.schema import BadRow, Row, UnusableRow, malformed
from align.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")

Record = tuple[str, int, object]
"""File, place in it from 1, and the object there, or the BadRow that says why there is none."""


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


def read_source(
    path: str,
    *,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    read_one: Callable[[object, str, int], Row] = read_row,
) -> SourceRows:
    """All rows of a file, a folder of files, or a hub data set.

    Args:
        path: a .jsonl, .jsonl.gz, .json or .parquet file, a folder of them, or a hub name.
        split: split of a hub data set (by default train), or the stem of the files to read in a folder.
        revision: of a hub data set.
        limit: at most this many rows are read.
        read_one: `read_row`, or `read_prompt` where the prompts alone count.

    Returns:
        The rows in file order, how many were read, and how many cannot be used, by reason.

    Raises:
        UserError: nothing to read at that path, or a malformed row: its place, what is wrong, the remedy, and how
            many more there are.
    """
    rows: list[Row] = []
    refused: Counter[str] = Counter()
    bad: list[str] = []
    read = 0
    for record in islice(stream_rows(path, split=split, revision=revision, read_one=read_one), limit):
        read += 1
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
    return SourceRows(rows=rows, read=read, refused=dict(refused))


def stream_rows(
    path: str,
    *,
    split: str | None = None,
    revision: str | None = None,
    read_one: Callable[[object, str, int], Row] = read_row,
) -> Iterator[StreamedRow]:
    """What `read_source` reads, one row at a time, the malformed ones among them.

    Raises:
        UserError: nothing can be read at that path, or from some place on.
    """
    for file, number, raw in records(path, split=split, revision=revision):
        row: Row | BadRow | UnusableRow
        try:
            row = raw if isinstance(raw, BadRow) else read_one(raw, file, number)
        except (BadRow, UnusableRow) as error:
            row = error
        yield StreamedRow(file, number, row.raw if row is raw and isinstance(row, BadRow) else raw, row)


def records(path: str, *, split: str | None = None, revision: str | None = None) -> Iterator[Record]:
    """The objects of a file, a folder or a hub data set as they stand there, unchecked.

    Raises:
        UserError: nothing can be read at that path, or from some place on.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        for file in _folder_files(place, split):
            yield from _file_records(file)
    elif place.exists():
        if not path.endswith(SUFFIXES):
            raise UserError(f"{path}: not a file that holds rows; known endings are {', '.join(SUFFIXES)}")
        yield from _file_records(place)
    else:
        yield from _hub_records(path, split, revision)


def _file_records(file: Path) -> Iterator[Record]:
    if file.name.endswith(".parquet"):
        return _parquet_records(file)
    if file.name.endswith(".json"):
        return _json_records(file)
    return _line_records(file)


def _line_records(file: Path) -> Iterator[Record]:
    opener = gzip.open if file.name.endswith(".gz") else open
    number = 0
    try:
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield str(file), number, _parse(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: broken gzip data after row {number} ({error}); fetch the file again") from None


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem, remedy = f"not UTF-8 (byte {error.start + 1} of the row)", "save the file as UTF-8"
    except json.JSONDecodeError as error:
        problem, remedy = f"not valid JSON ({error.msg} at character {error.pos + 1})", "mend or remove the row"
    except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
        problem, remedy = f"not valid JSON ({error})", "mend or remove the row"
    return BadRow(None, problem, remedy, raw=line.decode("utf-8", errors="backslashreplace").rstrip("\r\n"))


def _json_records(file: Path) -> Iterator[Record]:
    content = file.read_bytes()
    if not content.lstrip().startswith(b"["):
        yield from _line_records(file)
        return
    whole = _parse(content)
    if isinstance(whole, BadRow):
        raise UserError(f"{file}: {whole.problem}; {whole.remedy}")
    for number, raw in enumerate(whole, start=1):  # type: ignore[arg-type, var-annotated]
        yield str(file), number, raw


def _parquet_records(file: Path) -> Iterator[Record]:
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for raw in batch.to_pylist():
                number += 1
                yield str(file), number, raw
    except (pyarrow.ArrowException, OSError) as error:
        problem = f"broken Parquet data after row {number}" if number else "not a Parquet file, or a broken one"
        raise UserError(f"{file}: {problem} ({str(error).splitlines()[0]}); fetch the file again") from None


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(SUFFIXES))
    names = sorted({_split_name(file) for file in files})
    if split is not None:
        files = [file for file in files if _split_name(file) == split]
        if not files:
            raise UserError(f"{folder}: no file of split {split!r}; its splits are {', '.join(names) or 'none'}")
    if not files:
        raise UserError(
            f"{folder}: no file with one of the endings {', '.join(SUFFIXES)}; give a folder that holds some"
        )
    if split is None and len(names) > 1 and any(name in SPLIT_NAMES for name in names):
        raise UserError(f"{folder}: holds the splits {', '.join(names)}; name one with `split`")
    return files


def _split_name(file: Path) -> str:
    """The file's stem, without the number of a shard."""
    stem = file.name.removesuffix(".gz").rsplit(".", 1)[0]
    return re.sub(r"-\d+(-of-\d+)?$", "", stem)


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
