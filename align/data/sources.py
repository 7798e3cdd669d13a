"""Rows from files, folders and the hub."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from align.data.dataset_info import INFO, described_records, descriptions, in_its_words, records_of_file
from align.data.delimited import DELIMITED
from align.data.files import SUFFIXES, Record, choose_split, file_records, is_split
from align.data.formats import read_row
from align.data.gather import Found, gather
from align.data.packed import refuse_packed
from align.data.schema import BadRow, Malformed, Row, UnusableRow, changed
from align.data.source_view import SourceView, typed
from align.data.strict_json import DEEPEST, is_deep
from align.errors import UserError
from align.files import is_there, with_home

STATE, DICTIONARY = "state.json", "dataset_dict.json"
"""Files by which `save_to_disk` marks a data set, and one of several splits."""
BOOKKEEPING = (STATE, DICTIONARY, INFO, "dataset_infos.json")
SHARD = re.compile(r"[-_.](?:(?:part|shard|chunk)[-_.]?)?\d+(?:[-_.]of[-_.]\d+)?(?:[-_.][0-9a-f]{16,})?$", re.I)
"""What a shard's name ends with: `-00000-of-00001-3d4cd8309148a71f`, `_part_3`, `.0`."""


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
    joined: int = 0
    """How many rows of the file were joined with its first."""


@dataclass(frozen=True)
class SourceRows:
    """What one source gave."""

    rows: list[Row]
    read: int
    refused: dict[str, int]
    """How many rows nothing can be learnt from, by reason."""
    ignored: dict[str, int]
    """How many rows had a column that is ignored by request, by its name."""
    joined: int = 0
    """How many rows of the file were joined with the ones before them into lists."""


def read_source(
    path: str,
    *,
    split: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    turns: bool = False,
    limit: int | None = None,
    ignore: Sequence[str] = (),
    read_one: Callable[..., Row] = read_row,
) -> SourceRows:
    """All rows of a file, a folder of files, or a hub data set.

    Args:
        path: a .jsonl, .json, .csv or .tsv (each also .gz), .parquet or .arrow file, a folder of them, or a hub name.
        split: split of a hub data set (by default train), or of a folder or JSON file that holds several.
        revision: of a hub data set.
        config: its configuration.
        columns: our name of a column -> its place in the file, such as `answers.good`.
        where: a condition on the file's own columns; other rows are refused for the reason `where`.
        turns: whether plain texts are turns of a conversation.
        limit: at most this many rows are read.
        ignore: columns that count as absent; `items[].model` names a key of a list's objects.
        read_one: `read_row`, or `read_prompt` where the prompts alone count.

    Returns:
        The rows in file order, how many were read, and how many cannot be used, by reason.

    Raises:
        UserError: nothing to read at that path, or a malformed row: its place, what is wrong, the remedy, and how
            many more there are.
    """
    options: dict[str, Any] = {"split": split, "revision": revision, "config": config, "columns": columns}
    source = Source(path, **options, where=where, turns=turns, limit=limit, ignore=ignore, read_one=read_one)
    rows = list(source)
    return SourceRows(rows, source.read, dict(source.refused), dict(source.ignored), source.joined)


class Source:
    """What `read_source` reads, one row at a time; its counts are whole when the rows are at their end."""

    def __init__(
        self,
        path: str,
        *,
        columns: Mapping[str, str] | None = None,
        where: str | None = None,
        turns: bool = False,
        limit: int | None = None,
        ignore: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Args: as `read_source` has them."""
        self.path, self.ignore = path, ignore
        view = SourceView(columns or {}, where, turns)
        self._records = islice(stream_rows(path, view=view, ignore=ignore, **options), limit)
        self.read = self.joined = 0
        self.refused: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row]:
        """Raises:
        UserError: as `read_source` does, behind the last row.
        """
        bad = Malformed()
        for record in self._records:
            self.read += 1
            self.joined += record.joined
            if self.ignore and isinstance(record.raw, dict):
                names = record.raw.keys()
                self.ignored.update(name for name in self.ignore if {name, name.split("[].")[0]} & names)
            match record.row:
                case BadRow() as error:
                    bad.add(error.message(record.source, record.number))
                case UnusableRow() as reason:
                    self.refused[str(reason)] += 1
                case row:
                    yield row
        bad.check()
        if not self.read:
            raise UserError(f"{self.path}: no rows; give a source that holds some")


def stream_rows(
    path: str,
    *,
    split: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    view: SourceView | None = None,
    ignore: Sequence[str] = (),
    read_one: Callable[..., Row] = read_row,
) -> Iterator[StreamedRow]:
    """What `read_source` reads, one row at a time, the malformed ones among them.

    Raises:
        UserError: nothing can be read at that path, or from some place on.
    """
    view = view or SourceView()
    found = records(path, split=split, revision=revision, config=config)
    for one in gather(_seen(record, view) for record in found):
        row: Row | BadRow | UnusableRow
        number = one.number
        if one.refused is not None:
            raw = one.refused.raw if one.raw is one.refused else one.raw  # type: ignore[union-attr]
            refused = one.refused
            if isinstance(refused, BadRow):
                refused, number = _in_its_row(refused, one)
            yield StreamedRow(one.source, number, raw, refused, len(one.others))
            continue
        try:
            row = read_one(one.raw, one.source, one.number, ignore=ignore)
            row = changed(row, gathered=True) if one.gathered else row
        except BadRow as error:
            row, number = _in_its_row(error, one)
            row = in_its_words(row, one.raw)
            row = view.own_error(row, one.raw) if isinstance(one.raw, dict) else row
        except UnusableRow as error:
            row = error
        yield StreamedRow(one.source, number, one.raw, row, len(one.others))
    view.check(path)


def _seen(record: Record, view: SourceView) -> Found:
    """A record of the file as the readers see it."""
    source, number, raw = record
    if not isinstance(raw, dict):
        return Found(source, number, raw, raw if isinstance(raw, BadRow) else None)
    if is_deep(raw):
        return Found(source, number, raw, BadRow(None, f"nested deeper than {DEEPEST}", "mend or remove the row"))
    try:
        columns = view.of(raw)
    except (BadRow, UnusableRow) as error:
        return Found(source, number, raw, error)
    return Found(source, number, typed(columns) if source.endswith(DELIMITED) else columns)


def _in_its_row(error: BadRow, one: Found) -> tuple[BadRow, int]:
    """A refusal of a row that is made of several, with the number of the one at fault."""
    numbers = (one.number, *one.others)
    place = re.fullmatch(r"([^.\[]+)\[(\d+)\](.*)", error.field or "")
    if not one.others or place is None or int(place[2]) >= len(numbers):
        return error, one.number
    return BadRow(place[1] + place[3], error.problem, error.remedy, raw=error.raw), numbers[int(place[2])]


def records(
    path: str, *, split: str | None = None, revision: str | None = None, config: str | None = None
) -> Iterator[Record]:
    """The objects of a file, a folder or a hub data set as they stand there, unchecked.

    Raises:
        UserError: nothing can be read at that path, or from some place on.
    """
    place = with_home(path)
    for name, value in (("revision", revision), ("config", config)):
        if value is not None and is_there(place):
            raise UserError(f"{path}: is on this machine, and `{name}` is of a hub data set; leave it out")
    if is_there(place, Path.is_dir):
        yield from _folder_records(place, split)
    elif is_there(place):
        if not path.endswith(SUFFIXES):
            refuse_packed(place)
            raise UserError(f"{path}: not a file that holds rows; known endings are {', '.join(SUFFIXES)}")
        yield from records_of_file(place, split)
    else:
        yield from _hub_records(path, split, revision, config)


def _folder_records(folder: Path, split: str | None) -> Iterator[Record]:
    """Rows of all files of a folder, or of one split of it; what `save_to_disk` writes is such a folder, and what
    LLaMA-Factory describes.
    """
    if found := descriptions(folder):
        yield from described_records(folder, found, split)
        return
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


def hub_table(path: str, split: str | None, revision: str | None, config: str | None) -> Dataset:
    """A data set of the hub, memory-mapped.

    Raises:
        UserError: there is none of that name, or it cannot be loaded.
    """
    if path.endswith(SUFFIXES) or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"{path}: no such file{_nearest(Path(path))}")
    try:
        named = {} if config is None else {"name": config}
        return load_dataset(path, split=split or "train", revision=revision, **named)
    except DatasetNotFoundError as error:
        raise UserError(
            f"{path}: neither a local file{_nearest(Path(path))} nor a data set on the hub ({error})"
        ) from None
    except (ConnectionError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: no such local file{_nearest(Path(path))}, and the hub data set cannot be loaded ({error})"
        ) from None


def _hub_records(path: str, split: str | None, revision: str | None, config: str | None) -> Iterator[Record]:
    name = path if config is None else f"{path} ({config})"
    for number, raw in enumerate(hub_table(path, split, revision, config), start=1):
        yield name if split is None else f"{name} [{split}]", number, raw


def _nearest(path: Path) -> str:
    """A hint at the existing file with the most similar name, or nothing."""
    folder = with_home(str(path)).parent
    if not is_there(folder, Path.is_dir):
        return f" (no folder {folder} either)"
    close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f" (did you mean {folder / close[0]}?)" if close else ""
