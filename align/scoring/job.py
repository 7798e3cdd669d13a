"""The files of one `align score`: parts that are whole or absent, and what says that they belong together."""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.files import write_json
from align.runs.run_directory import differing_keys
from align.scoring.items import as_json
from align.scoring.scoring import Scored

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
        return bool(json.loads(self.summary.read_text()).get("job") == self.description)

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
            old = json.loads((self.folder / "job.json").read_text())["job"]
            changed = sorted(differing_keys(old, self.description))
            if changed:
                raise UserError(
                    f"{self.folder}: holds parts of another job (it differs in {', '.join(changed)}); give the same "
                    "command again, another output, or remove the folder"
                )
        elif self.output.exists() and not self.finished():
            raise UserError(f"{self.output}: is there already; give another output, or remove it")

    def open(self, cache_state: int) -> None:
        """Start, or go on: the cache is read as it was at the first start, so that the results stay the same."""
        self.folder.mkdir(exist_ok=True)
        if not self.parts():  # what a job that failed before its first part has left may be another's
            write_json(self.folder / "job.json", {"job": self.description, "cache_state": cache_state})

    def cache_state(self) -> int:
        """How far the cache reached when the job was started first."""
        return int(json.loads((self.folder / "job.json").read_text())["cache_state"])

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:07d}.jsonl"

    def write_part(self, number: int, window: Sequence[Scored], counts: dict[str, float]) -> None:
        """A window's rows behind a line of counts; the whole file or none."""
        lines = [as_json(counts)]
        for scored in window:
            item = scored.item
            if item.reason is None:
                lines.append(as_json({"row": item.kept, "answers": item.answers, "rewards": scored.rewards}))
            else:
                error = {"source": item.source, "row": item.number, "reason": item.reason, "raw": item.raw}
                lines.append(json.dumps({"error": error}, default=str))  # ASCII: it may hold what is no Unicode
        temporary = self.part(number).with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, self.part(number))

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
                next(lines)
                yield from map(json.loads, lines)

    def close(self, summary: dict[str, Any]) -> None:
        """Say that the output is whole, and remove the parts."""
        write_json(self.summary, {"job": self.description, **summary})
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path` when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


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
        for chunk in _chunks(rows()):
            schema = pa.unify_schemas([schema, pa.Table.from_pylist(chunk).schema], promote_options="permissive")
        with parquet.ParquetWriter(temporary, schema) as writer:
            for chunk in _chunks(rows()):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(
            f"{path}: a column holds values of different kinds, which Parquet cannot ({str(error).splitlines()[0]}); "
            "give an output that ends with .jsonl"
        ) from None


def _chunks(rows: Iterator[dict[str, Any]], size: int = 1000) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
