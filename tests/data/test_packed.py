"""Packed files: what is known by its first bytes, and how much is unpacked at once."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from align.data import delimited, files, packed, read_source
from align.errors import UserError

ROW = {"prompt": "a", "chosen": "b" * 300, "rejected": "c"}
LINE = json.dumps(ROW) + "\n"
TABLE = "prompt,chosen,rejected\na," + "b" * 300 + ",c\n"
ARRAY = json.dumps([ROW], indent=1)


@pytest.fixture
def small(monkeypatch):
    for place, name in ((packed, "UNPACKED"), (packed, "LINE"), (delimited, "LINE")):
        monkeypatch.setattr(place, name, 400)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("long.jsonl.gz", LINE + LINE.replace("b", 200 * "b"), "line 2 is longer than 400 bytes unpacked; unpack"),
        ("long.csv.gz", TABLE.replace("b", "bb"), "line 2 is longer than 400 bytes unpacked"),
        (
            "cell.csv.gz",
            TABLE.replace("bbb", "'bb\n").replace("'", '"', 1) + '"',
            "broken quoting after row 0 .field larger",
        ),
        ("header.csv.gz", 500 * ",", "line 1 is longer than 400 bytes unpacked"),
        ("whole.json.gz", ARRAY, "takes more than 400 bytes unpacked, and has no row a line"),
        ("brackets.jsonl.gz", "[\n" * 9, "takes more than 400 bytes unpacked, and has no row a line"),
    ],
)
def test_what_unpacks_to_too_much_at_once_is_refused(tmp_path, small, name, content, said):
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    with pytest.raises(UserError, match=rf"{name}: {said}"):
        read_source(str(tmp_path / name))


def test_what_is_in_bounds_or_not_packed_is_read(tmp_path, small):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINE.encode() * 20))
    assert read_source(str(tmp_path / "a.jsonl.gz")).read == 20
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    assert len(read_source(str(tmp_path / "a.csv.gz")).rows[0].completions[0]) == 300
    for name, content in (("a.json", ARRAY), ("a.jsonl", LINE.replace("b", 500 * "b")), ("a.csv", 3 * TABLE)):
        (tmp_path / name).write_text(content)
        assert read_source(str(tmp_path / name), limit=1).read == 1


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_few_bytes_of_a_table_that_stand_for_gigabytes_are_refused(tmp_path, monkeypatch, name):
    """A dictionary, or packed buffers, of one long text."""
    monkeypatch.setattr(files, "UNPACKED_ROWS", 2**28)
    text, count = "a" * 10**6, 1000
    long = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))
    table = pa.table({"prompt": ["q"] * count, "chosen": long, "rejected": ["b"] * count})
    if name == "rows.parquet":
        parquet.write_table(table, tmp_path / name, store_schema=False)
    else:
        packs = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(tmp_path / name, table.schema, options=packs) as writer:
            writer.write_table(table)
    assert (tmp_path / name).stat().st_size < 60_000
    with pytest.raises(UserError, match=rf"{name}: the rows after row 0 take more than 0 GiB of memory"):
        read_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.zst", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize(
    ("begins", "said"),
    [
        (b"\x28\xb5\x2f\xfd", "packed with zstd; unpack it, or pack it with gzip as .gz"),
        (b"PK\x03\x04", "packed with zip; unpack it"),
        (b"\x1f\x8b", "packed with gzip; let its name end with .gz"),
    ],
)
def test_what_else_is_packed_is_named(tmp_path, name, begins, said):
    (tmp_path / name).write_bytes(begins + bytes(20))
    with pytest.raises(UserError, match=f"{name}: {said}"):
        read_source(str(tmp_path / name))
