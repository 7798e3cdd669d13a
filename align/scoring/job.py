"""The files of one `align score`: parts that are whole or absent, and what says that they belong together."""

import gzip
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from align.data.schema import is_messages
from align.data.tools import TOOLS
from align.errors import UserError
from align.files import read_object, remove_folder, replaced, write_json, write_text
from align.locks import alone
from align.manifest import file_digest, json_digest
from align.runs.trees import differing_keys
from align.scoring.items import as_json
from align.scoring.scoring import Scored
from rewards.spelling import with_text_arguments

log = logging.getLogger("align")

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


class Job:
    """OUTPUT, OUTPUT.summary.json, OUTPUT.errors.jsonl and, until it is done, OUTPUT.parts/."""

    def __init__(self, output: Path, description: dict[str, Any]) -> None:
        self.output = output
        self.description = description
        self.folder = output.parent / f"{output.name}.parts"
        self.summary = output.parent / f"{output.name}.summary.json"
        self.errors = output.parent / f"{output.name}.errors.jsonl"

    def finished(self) -> bool:
        """Whether the output of this very job is there."""
        if not (self.output.exists() and self.summary.exists()):
            return False
        return bool(read_object(self.summary).get("job") == self.description)

    def read_summary(self) -> dict[str, Any]:
        """What a finished job has said of its output, which is as it was written.

        Raises:
            UserError: one of the two is not.
        """
        value = read_object(self.summary)
        about = {name: own for name, own in value.items() if name != "digest"}
        for file, is_whole in (
            (self.summary, value.get("digest") == json_digest(about)),
            (self.output, about.get("output_digest") == file_digest(self.output)),
        ):
            if not is_whole:
                raise UserError(
                    f"{file}: damaged, it is not as it was written; remove {self.output}, and the same command writes "
                    "both again, or give another output"
                )
        return value

    def check(self) -> None:
        """Refuse to mix with, or write over, what another job has left.

        Raises:
            UserError: an ending that cannot be written, no folder there, or files of another job.
        """
        if not self.output.name.endswith(ENDINGS):
            raise UserError(f"{self.output}: known endings of an output are {', '.join(ENDINGS)}")
        if not self.output.absolute().parent.is_dir():
            raise UserError(f"{self.output}: there is no folder {self.output.parent}; make it first")
        if self.parts():
            old = self._begun()["job"]
            changed = sorted(differing_keys(old, self.description))
            if changed:
                raise UserError(
                    f"{self.folder}: holds parts of another job (it differs in {', '.join(changed)}); give the same "
                    "command again, another output, or remove the folder"
                )
        elif self.output.exists() and not self.finished():
            raise UserError(f"{self.output}: is there already; give another output, or remove it")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the parts against other processes.

        Raises:
            UserError: another process holds them, or has left what `check` refuses.
        """
        with alone(self.folder, instead="give another output"):
            self.check()
            yield

    def open(self, cache_state: int) -> None:
        """Start, or go on: the cache is read as it was at the first start, so that the results stay the same; damaged
        parts are said, removed and made again."""
        for path in self.parts():
            digest, _, text = path.read_bytes().partition(b"\n")
            if digest != _digest(text):
                log.warning("%s: damaged; its rows are scored again", path)
                path.unlink()
        if not self.parts():  # what a job that failed before its first part has left may be another's
            value = {"job": self.description, "cache_state": cache_state}
            write_json(self.folder / "job.json", value | {"digest": json_digest(value)})

    def cache_state(self) -> int:
        """How far the cache reached when the job was started first."""
        return int(self._begun()["cache_state"])

    def _begun(self) -> dict[str, Any]:
        """What the job was when it was started first."""
        file = self.folder / "job.json"
        if not file.exists():
            raise UserError(f"{file}: is missing; remove {self.folder}, and the job begins anew")
        value = read_object(file)
        if value.pop("digest", None) != json_digest(value):
            raise UserError(
                f"{file}: damaged, it is not as it was written; remove {self.folder}, and the job begins anew"
            )
        return value

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:07d}.jsonl"

    def write_part(self, number: int, text: str) -> None:
        """What `as_part` gave for a window; the whole file or none."""
        write_text(self.part(number), f"{_digest(text.encode()).decode()}\n{text}")

    def expect_parts(self, count: int) -> None:
        """Make sure that no window is without its part.

        Raises:
            RuntimeError: one is, so the output would lack rows.
        """
        missing = [number for number in range(count) if not self.part(number).exists()]
        if missing or len(self.parts()) != count:
            raise RuntimeError(f"{self.folder}: {count} windows, but {len(self.parts())} parts; missing: {missing[:9]}")

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))

    def counts(self) -> dict[str, float]:
        """Sums of the parts' counts."""
        totals: dict[str, float] = {}
        for path in self.parts():
            with path.open(encoding="utf-8") as lines:
                next(lines)  # the digest
                for name, value in json.loads(next(lines)).items():
                    totals[name] = totals.get(name, 0) + value
        return totals

    def scored(self) -> Iterator[dict[str, Any]]:
        """The rows that have rewards, in the order of the input."""
        return (entry for entry in self._entries() if "error" not in entry)

    def failed(self) -> Iterator[dict[str, Any]]:
        """What is known of the rows that have none."""
        return (entry["error"] for entry in self._entries() if "error" in entry)

    def _entries(self) -> Iterator[dict[str, Any]]:
        for path in self.parts():
            with path.open(encoding="utf-8") as lines:
                yield from map(json.loads, islice(lines, 2, None))

    def close(self, summary: dict[str, Any]) -> None:
        """Say that the output is whole, and remove the parts."""
        value = {"job": self.description, **summary, "output_digest": file_digest(self.output)}
        write_json(self.summary, value | {"digest": json_digest(value)})
        remove_folder(self.folder)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def as_part(window: Sequence[Scored], counts: dict[str, float]) -> str:
    """A window's rows behind a line of counts."""
    lines = [as_json(counts)]
    for scored in window:
        item = scored.item
        if item.reason is None:
            lines.append(as_json({"row": item.kept, "answers": item.answers, "rewards": scored.rewards}))
        else:
            error = {"source": item.source, "row": item.number, "reason": item.reason, "raw": item.raw}
            lines.append(json.dumps({"error": error}, default=str))  # ASCII: it may hold what is no Unicode
    return "\n".join(lines) + "\n"


def write_rows(path: Path, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
    """Rows as JSONL, gzip-compressed JSONL or Parquet, by the path's ending; equal rows give equal bytes.

    Args:
        rows: gives what is written from its beginning; Parquet has to know all columns before its first row.

    Raises:
        UserError: a column holds values of different kinds, which Parquet cannot.
    """
    with replaced(path) as temporary:
        if path.name.endswith(".parquet"):
            _write_parquet(path, temporary, rows)
        elif path.name.endswith(".gz"):
            with temporary.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
                file.writelines((as_json(row) + "\n").encode() for row in rows())
        else:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(as_json(row) + "\n" for row in rows())


def _write_parquet(path: Path, temporary: Path, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = pa.schema([])
        for chunk in _chunks(map(_for_parquet, rows())):
            schema = pa.unify_schemas([schema, pa.Table.from_pylist(chunk).schema], promote_options="permissive")
        with parquet.ParquetWriter(temporary, schema) as writer:
            for chunk in _chunks(map(_for_parquet, rows())):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"{path}: a column holds values of different kinds, or none, which Parquet cannot ({why}); "
            "give an output that ends with .jsonl"
        ) from None


def _for_parquet(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose tools and arguments of calls are JSON text: as objects every one would get the keys of all others."""
    tools = {TOOLS[0]: json.dumps(row[TOOLS[0]], ensure_ascii=False)} if row.get(TOOLS[0]) else {}
    completions = [_with_text_arguments(own) for own in row["completions"]]
    return {**row, **tools, "prompt": _with_text_arguments(row["prompt"]), "completions": completions}


def _with_text_arguments(text: Any) -> Any:
    if not is_messages(text):
        return text
    return [
        {**own, "tool_calls": with_text_arguments(own["tool_calls"])} if "tool_calls" in own else own for own in text
    ]


def _chunks(rows: Iterator[dict[str, Any]], size: int = 1000) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
