"""The objects of one file, whatever wrote it: JSON lines, JSON, CSV, Parquet, Arrow."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet

from align.data.delimited import DELIMITED, delimited_records
from align.data.packed import UNPACKED_ROWS, all_lines, is_packed, lines_of, refuse_packed
from align.data.schema import BadRow
from align.data.strict_json import decoder, what_is_wrong
from align.errors import UserError
from rewards.rendering import growing_by

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow", *DELIMITED)
TABLES = (".parquet", ".arrow")
CONTAINERS = ("data", "rows", "examples", "instances", "records")
"""Keys under which a JSON file may hold all its rows, besides a split's name."""
ROW_KEYS = {"prompt", "question", "query", "instruction", "input", "system", "chosen", "rejected", "response", "text"}
"""Keys whose text makes an object a row, whatever else is in it."""
BLANK = re.compile(r"[ \t\r\n]*")
SPLIT_WORDS = {"train", "training", "test", "testing", "valid", "validation", "val", "eval", "evaluation", "dev"} | {
    "held",
    "holdout",
    "heldout",
}
"""A name that holds one of them as a word is a split's."""

Record = tuple[str, int, object]
"""File, place in it from 1, and the object there, or the BadRow that says why there is none."""


def file_records(file: Path, *, split: str | None = None) -> Iterator[Record]:
    """The objects of a file as they stand there, unchecked.

    Args:
        split: of a JSON file that holds several under their names.

    Raises:
        UserError: nothing can be read there, or from some place on.
    """
    refuse_packed(file)
    if file.name.endswith(TABLES):
        _refuse_split(file, split)
        return _table_records(file)
    if file.name.endswith(DELIMITED):
        _refuse_split(file, split)
        return delimited_records(file)
    return _json_records(file, split)


def is_split(name: str) -> bool:
    """Whether train, test, valid, eval, dev or the like is a word of a name: `train_prefs`, `testGen`, `my.DEV.v2`."""
    return any(word.lower() in SPLIT_WORDS for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name))


def choose_split(place: Path, names: list[str], split: str | None) -> list[str]:
    """The one of several splits that is asked for, however its letters are written.

    Raises:
        UserError: none is asked for, or one that is not there.
    """
    if split is None:
        raise UserError(f"{place}: holds the splits {', '.join(names)}; name one with `split`")
    if found := [name for name in names if name.lower() == split.lower()]:
        return found
    raise UserError(f"{place}: no file of split {split!r}; its splits are {', '.join(names) or 'none'}")


def _refuse_split(file: Path, split: str | None) -> None:
    """Refuse a split of a file that holds none, but for its own name."""
    if split is not None and file.name.split(".")[0].lower() != split.lower():
        raise UserError(f"{file}: holds no splits, so that `split` {split!r} would choose nothing; leave it out")


def _json_records(file: Path, split: str | None) -> Iterator[Record]:
    """Lines of an object each, or else the file as a whole."""
    lines = _lines(file)
    head = list(islice(lines, 1))
    if not head:
        return
    first = _parse(head[0][1])
    if not isinstance(first, dict) or _is_container(first) or _is_by_columns(first):
        head += all_lines(file, lines)
        whole = _whole(file, head, split)
        if whole is not None:
            yield from ((str(file), number, raw) for number, raw in enumerate(whole, start=1))
            return
    _refuse_split(file, split)
    for number, line in chain(head, lines):
        yield str(file), number, _parse(line)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, in UTF-8, with their numbers."""
    with file.open("rb") as start:
        encoding = json.detect_encoding(start.read(4).ljust(4, b" "))
    if not encoding.startswith("utf-8"):
        yield from _filled(enumerate(_decoded(file, encoding).encode().splitlines(keepends=True), start=1))
        return
    number = 0
    try:
        opened: Any = gzip.open if is_packed(file) else open
        with opened(file, "rb") as lines:
            for number, line in _filled(enumerate(lines_of(file, lines), start=1)):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: broken gzip data after row {number} ({error}); fetch the file again") from None


def _filled(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in lines if line.strip())


def _whole(file: Path, lines: list[tuple[int, bytes]], split: str | None) -> list[Any] | None:
    """The rows of an array, of an object that holds them, or objects one after the other over several lines each.

    None where the file is none of that, so that its lines are what is wrong.
    """
    gaps = (after - before - 1 for before, after in pairwise([0, *(number for number, _ in lines)]))
    parts = [b"\n" * gap + line for gap, (_, line) in zip(gaps, lines, strict=True)]
    text = b"".join(parts).decode("utf-8-sig", errors="surrogateescape")
    values = _values(text)
    if isinstance(values, BadRow):
        several = text.lstrip().startswith("[") or len(lines) > 1
        if (
            file.name.endswith((".json", ".json.gz"))
            and several
            and not any(isinstance(_parse(line), dict) for _, line in lines)
        ):
            raise UserError(f"{file}: {values.problem}; {values.remedy}")
        return None
    if len(values) == 1 and _is_container(values[0]):
        return _contained(file, values[0], split)
    _refuse_split(file, split)
    if len(values) == 1:
        return _rows(file, values[0])
    return values if all(isinstance(value, dict) for value in values) else None


def _values(text: str) -> list[Any] | BadRow:
    """All JSON values of a text, one after the other."""
    values: list[Any] = []
    place, read = _next(text, 0), decoder()
    try:
        while place < len(text):
            value, place = read.raw_decode(text, place)
            values.append(_without_nan(value))
            place = _next(text, place)
    except (RecursionError, ValueError) as error:
        return _not_json(error, text)
    return values


def _next(text: str, place: int) -> int:
    return BLANK.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing too


def _contained(file: Path, value: dict[str, Any], split: str | None) -> list[Any]:
    """The rows that an object holds, or those of one of its splits."""
    names = [name for name in value if isinstance(value[name], list)]
    splits = [name for name in names if is_split(name)]
    if len(splits) > 1 or (splits and split):
        splits = choose_split(file, splits, split)
    elif not splits:
        _refuse_split(file, split)
    return [_without_nan(row) for row in value[(splits or names)[0]]]


def _rows(file: Path, value: Any) -> list[Any] | None:
    """The rows in a JSON file's only value."""
    if isinstance(value, list):
        plain = value and not isinstance(value[0], dict) and not file.name.endswith((".json", ".json.gz"))
        return None if plain else [_without_nan(row) for row in value]
    if not isinstance(value, dict):
        raise UserError(f"{file}: JSON, but {type(value).__name__} and no rows; give a list of objects, or one a line")
    if _is_by_columns(value):
        raise UserError(f"{file}: a table by columns, as pandas writes it; write `to_json(..., orient='records')`")
    return [value]


def _is_container(value: Any) -> bool:
    """Whether an object is no row but holds the rows, under `data` or under splits' names."""
    if not isinstance(value, dict):
        return False
    lists = [name for name, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    own = any(isinstance(one, str) and name in ROW_KEYS for name, one in value.items())
    return bool(lists) and not own and all(name in CONTAINERS or is_split(name) for name in lists)


def _is_by_columns(value: dict[str, Any]) -> bool:
    return len(value) > 1 and all(isinstance(column, dict) and "0" in column for column in value.values())


def _decoded(file: Path, encoding: str) -> str:
    try:
        return file.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: looks like {encoding}, but is not ({error.reason}); save it as UTF-8") from None


def _parse(line: bytes) -> object:
    try:
        return _without_nan(decoder().decode(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        problem, remedy = f"not UTF-8 (byte {error.start + 1} of the row)", "save the file as UTF-8"
        return BadRow(None, problem, remedy, raw=_as_text(line))
    except (RecursionError, ValueError) as error:
        return _not_json(error, _as_text(line))


def _as_text(line: bytes) -> str:
    return line.decode("utf-8", errors="backslashreplace").rstrip("\r\n")


def _not_json(error: Exception, raw: str) -> BadRow:
    return BadRow(None, f"not valid JSON ({what_is_wrong(error)})", "mend or remove the row", raw=raw)


def _without_nan(value: Any) -> Any:
    """A row in which NaN in place of a whole column's value, as tables with gaps are written, is nothing."""
    if not isinstance(value, dict):
        return value
    return {name: None if one != one else one for name, one in value.items()}


def _table_records(file: Path) -> Iterator[Record]:
    number = 0
    try:
        for rows in _unpacked(file):
            for raw in rows:
                number += 1
                yield str(file), number, raw
    except MemoryError:
        raise UserError(
            f"{file}: the rows after row {number} take more than {UNPACKED_ROWS >> 30} GiB of memory at once; write "
            "them as JSON lines"
        ) from None
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        LookupError,
    ) as error:  # and values beyond Python's
        _refuse_table(file, number, error)


def _unpacked(file: Path) -> Iterator[list[Any]]:
    """A table's rows, some at a time, which may take little in the file and much in memory."""
    batches = _batches(file)
    while True:
        with growing_by(UNPACKED_ROWS):
            batch = next(batches, None)
            if batch is None:
                return
            if twice := _twice(batch.schema):
                raise UserError(f"{file}: the column `{twice}` is there twice; rename or remove one")
            batch.validate(full=True)  # else a damaged file's offsets lead out of it, and the process ends there
            rows = batch.to_pylist()
        yield rows


def _twice(fields: Iterable[pyarrow.Field], above: str = "") -> str | None:
    """A column, or a key of the objects in one, that is there twice, of which Python's objects would keep the last."""
    fields = list(fields)
    counts = Counter(field.name for field in fields)
    for field in fields:
        place = f"{above}{field.name}"
        if counts[field.name] > 1:
            return place
        kind = field.type
        while pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            kind = kind.value_type
        if pyarrow.types.is_struct(kind) and (twice := _twice(kind, f"{place}.")):
            return twice
    return None


def _batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    if file.name.endswith(".parquet"):
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000)
        return
    with pyarrow.memory_map(str(file)) as source:
        try:
            yield from pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two layouts, Feather's
            opened = pyarrow.ipc.open_file(source)
            yield from (opened.get_batch(i) for i in range(opened.num_record_batches))


def _refuse_table(file: Path, number: int, error: Exception) -> NoReturn:
    kind = "Parquet" if file.name.endswith(".parquet") else "Arrow"
    problem = f"broken {kind} data after row {number}" if number else f"not a {kind} file, or a broken one"
    raise UserError(
        f"{file}: {problem} ({next(iter(str(error).splitlines()), type(error).__name__)}); fetch the file again"
    ) from None
