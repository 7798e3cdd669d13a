"""Files, folders and names that rows come from."""

import gzip
import json

import datasets
import pytest

from align.data import read_source
from align.errors import UserError

ROWS = [{"prompt": f"p{n}", "chosen": "good", "rejected": "bad"} for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def prompts(path, **options):
    return [row.prompt for row in read_source(str(path), **options).rows]


def write_parquet(file, rows):
    datasets.Dataset.from_list(rows).to_parquet(file)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "d.json").write_text(LINES)
    write_parquet(tmp_path / "e.parquet", ROWS)
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.parquet"):
        source = read_source(str(tmp_path / name))
        assert [row.prompt for row in source.rows] == ["p0", "p1", "p2", "p3"], name
        assert [row.number for row in source.rows] == [1, 2, 3, 4], name
        assert source.read == 4


def test_row_numbers_are_line_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + LINES.replace("\n", "\r\n\r\n"))
    assert [row.number for row in read_source(str(tmp_path / "a.jsonl")).rows] == [2, 4, 6, 8]


def test_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    assert prompts(tmp_path / "a.jsonl") == ["p0", "p1", "p2", "p3"]


def test_limit_reads_no_further(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-4])  # broken at its end
    assert prompts(tmp_path / "a.jsonl.gz", limit=2) == ["p0", "p1"]


def test_parquet_null_columns_count_as_absent(tmp_path):
    message = {"role": "user", "content": "hi", "tool_calls": None}
    rows = [{"messages": [message], "prompt": None, "chosen": "a", "rejected": "b", "margin": None}]
    write_parquet(tmp_path / "a.parquet", rows)
    row = read_source(str(tmp_path / "a.parquet")).rows[0]
    assert (row.prompt, row.meta) == ([{"role": "user", "content": "hi"}], {})


def test_folder_of_shards_is_read_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in (1, 0):
        file = tmp_path / "data" / f"train-0000{shard}-of-00002.jsonl"
        file.write_text(json.dumps(ROWS[shard]) + "\n")
    assert prompts(tmp_path) == prompts(tmp_path, split="train") == ["p0", "p1"]


def test_folder_with_splits_needs_a_name(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[3]).encode()))
    (tmp_path / "README.md").write_text("not rows")
    assert prompts(tmp_path, split="test") == ["p3"]
    with pytest.raises(UserError) as refusal:
        prompts(tmp_path)
    assert str(refusal.value) == f"{tmp_path}: holds the splits test, train; name one with `split`"
    with pytest.raises(UserError) as refusal:
        prompts(tmp_path, split="dev")
    assert str(refusal.value) == f"{tmp_path}: no file of split 'dev'; its splits are test, train"


def test_folder_without_rows(tmp_path):
    with pytest.raises(UserError) as refusal:
        prompts(tmp_path)
    endings = ".jsonl, .jsonl.gz, .json, .parquet"
    assert str(refusal.value) == f"{tmp_path}: no file with one of the endings {endings}; give a folder that holds some"


def test_file_of_another_kind(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen\n")
    with pytest.raises(UserError) as refusal:
        prompts(tmp_path / "rows.csv")
    known = ".jsonl, .jsonl.gz, .json, .parquet"
    assert str(refusal.value) == f"{tmp_path}/rows.csv: not a file that holds rows; known endings are {known}"


def test_misspelt_file_gets_the_nearest_name(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(LINES)
    with pytest.raises(UserError) as refusal:
        prompts(tmp_path / "pair.jsonl")
    assert str(refusal.value) == f"{tmp_path}/pair.jsonl: no such file (did you mean {tmp_path}/pairs.jsonl?)"


def test_missing_folder(tmp_path):
    with pytest.raises(UserError) as refusal:
        prompts(tmp_path / "no" / "pairs.jsonl")
    assert str(refusal.value) == f"{tmp_path}/no/pairs.jsonl: no such file (no folder {tmp_path}/no either)"


def test_hub_name_goes_to_load_dataset(monkeypatch):
    calls = []

    def load(path, **options):
        calls.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("align.data.sources.load_dataset", load)
    rows = read_source("owner/name", split="train_prefs", revision="abc", limit=3).rows
    assert calls == [("owner/name", {"split": "train_prefs", "revision": "abc"})]
    assert [(row.prompt, row.source) for row in rows] == [(f"p{n}", "owner/name [train_prefs]") for n in range(3)]


def test_hub_out_of_reach(monkeypatch):
    def load(path, **options):
        raise ConnectionError("offline mode")

    monkeypatch.setattr("align.data.sources.load_dataset", load)
    with pytest.raises(UserError) as refusal:
        read_source("owner_of/name")
    assert str(refusal.value) == (
        "owner_of/name: no such local file (no folder owner_of either), "
        "and the hub data set cannot be loaded (offline mode)"
    )
