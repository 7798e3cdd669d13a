"""Files, folders and names that rows come from."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
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
    endings = ".jsonl, .jsonl.gz, .json, .json.gz, .parquet, .arrow, .csv, .csv.gz, .tsv, .tsv.gz"
    assert str(refusal.value) == f"{tmp_path}: no file with one of the endings {endings}; give a folder that holds some"


def test_file_of_another_kind(tmp_path):
    (tmp_path / "rows.xlsx").write_text("prompt,chosen\n")
    with pytest.raises(UserError) as refusal:
        prompts(tmp_path / "rows.xlsx")
    known = ".jsonl, .jsonl.gz, .json, .json.gz, .parquet, .arrow, .csv, .csv.gz, .tsv, .tsv.gz"
    assert str(refusal.value) == f"{tmp_path}/rows.xlsx: not a file that holds rows; known endings are {known}"


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


HASH = "3d4cd8309148a71f"
SPLITS = {
    ("train_prefs.jsonl", "test_prefs.jsonl"): "test_prefs",
    ("prefs_train.jsonl", "prefs_test.jsonl.gz"): "prefs_test",
    (f"train-00000-of-00001-{HASH}.parquet", f"test-00000-of-00001-{HASH}.parquet"): "test",
    (f"data/train_prefs-00000-of-00001-{HASH}.parquet", f"data/test_gen-00000-of-00001-{HASH}.parquet"): "test_gen",
    ("train/0.parquet", "test/0.parquet"): "test",
    ("data/train/0.parquet", "data/validation/0.parquet"): "validation",
    ("default/train/0000.parquet", "default/partial-test/0000.parquet"): "partial-test",
    ("train/rows.jsonl", "dev/rows.jsonl"): "dev",
    ("prefs.train.jsonl", "prefs.eval.v2.jsonl"): "prefs.eval.v2",
    ("TRAIN.jsonl", "TEST.jsonl"): "TEST",
    ("pairsTrain.jsonl", "pairsTest.jsonl"): "pairsTest",
    ("pairs.jsonl", "pairs_heldout.jsonl"): "pairs_heldout",
    ("pairs.jsonl", "pairs-held-out.jsonl"): "pairs-held-out",
    ("train_part_0.jsonl", "valid_part_0.jsonl"): "valid",
    ("training.jsonl", "evaluation.jsonl"): "evaluation",
}


@pytest.mark.parametrize(("files", "wanted"), SPLITS.items(), ids=str)
def test_a_split_is_a_word_of_a_file_or_folder_and_must_be_named(tmp_path, files, wanted):
    for number, name in enumerate(files):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(ROWS[number]) + "\n"
        if name.endswith(".parquet"):
            write_parquet(file, [ROWS[number]])
        else:
            file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(UserError, match=rf"holds the splits .*{wanted}.*; name one with `split`"):
        prompts(tmp_path)
    assert prompts(tmp_path, split=wanted) == prompts(tmp_path, split=wanted.lower()) == ["p1"]


def test_words_that_only_look_like_splits_are_none(tmp_path):
    for number, name in enumerate(("latest.jsonl", "trained_on.jsonl", "devices.jsonl", "evaluated.jsonl")):
        (tmp_path / name).write_text(json.dumps(ROWS[number]) + "\n")
    assert sorted(prompts(tmp_path)) == ["p0", "p1", "p2", "p3"]


def test_shards_of_one_split_need_no_name(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"train-0000{number}-of-00003-{HASH[number:]}{HASH[:number]}.parquet", [ROWS[number]])
    assert prompts(tmp_path) == prompts(tmp_path, split="train") == ["p0", "p1", "p2"]


def test_hidden_copies_in_a_folder_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(LINES)
    for folder in (".ipynb_checkpoints", "__MACOSX", ".cache/huggingface"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "rows-checkpoint.jsonl").write_text(LINES)
    assert prompts(tmp_path) == ["p0", "p1", "p2", "p3"]


def test_what_save_to_disk_writes_is_read(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.select([3, 1]).save_to_disk(tmp_path / "one", num_shards=2)
    loaded = datasets.load_from_disk(str(tmp_path / "one"))
    loaded.map(lambda row: {"more": 1})  # leaves a cache beside the rows
    assert list(tmp_path.glob("one/cache-*.arrow")), "the test needs that cache"
    assert prompts(tmp_path / "one") == ["p3", "p1"]
    assert prompts(sorted((tmp_path / "one").glob("data-*.arrow"))[0]) == ["p3"]
    splits = datasets.DatasetDict({"train": rows.select([0]), "test": rows.select([1])})
    splits.save_to_disk(tmp_path / "two")
    named = datasets.DatasetDict({"helpful": rows.select([2]), "harmless": rows.select([3])})
    named.save_to_disk(tmp_path / "named")
    for name, first, place in (("two", "test, train", "train"), ("named", "harmless, helpful", "helpful")):
        with pytest.raises(UserError, match=f"holds the splits {first}; name one with `split`"):
            prompts(tmp_path / name)
        assert prompts(tmp_path / name, split=place) == {"two": ["p0"], "named": ["p2"]}[name]
    only = datasets.DatasetDict({"test": rows.select([1])})
    only.save_to_disk(tmp_path / "only")
    assert prompts(tmp_path / "only") == ["p1"]


PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)
JSON_FILES = {
    "an array": json.dumps(ROWS),
    "an array over lines": json.dumps(ROWS, indent=2),
    "lines": LINES,
    "lines of Windows": LINES.replace("\n", "\r\n"),
    "lines of the old Macintosh": LINES.replace("\n", "\r"),
    "objects over several lines": PRETTY,
    "the same with blank lines": "\n\n" + PRETTY.replace("}\n{", "}\n\n{"),
    "data": json.dumps({"data": ROWS}),
    "data over lines, with a version": json.dumps({"version": "1.0", "data": ROWS}, indent=1),
    "a split": json.dumps({"train": ROWS}, indent=2),
    "rows with a data column": "".join(json.dumps({**row, "data": [{"x": 1}]}) + "\n" for row in ROWS),
}


ENCODED = [(e, end) for e in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32") for end in ("json", "jsonl")]


@pytest.mark.parametrize(("encoding", "ending"), [*ENCODED, ("utf-8", "jsonl.gz"), ("utf-8-sig", "json.gz")])
@pytest.mark.parametrize("shape", JSON_FILES)
def test_well_formed_json_of_any_shape_and_encoding_is_read(tmp_path, shape, encoding, ending):
    content = JSON_FILES[shape].encode(encoding)
    if ending.endswith("gz"):
        content = gzip.compress(content)
    (tmp_path / f"rows.{ending}").write_bytes(content)
    assert prompts(tmp_path / f"rows.{ending}") == ["p0", "p1", "p2", "p3"]


def test_one_object_over_several_lines_is_a_row(tmp_path):
    for ending in ("json", "jsonl"):
        (tmp_path / f"a.{ending}").write_text(json.dumps(ROWS[2], indent=2))
        assert prompts(tmp_path / f"a.{ending}") == ["p2"]
    (tmp_path / "b.json").write_text(json.dumps({**ROWS[1], "data": [{"x": 1}]}))
    assert prompts(tmp_path / "b.json") == ["p1"], "a row that happens to have a column of that name"


def test_a_json_file_of_splits_needs_a_name(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS[:1], "test": ROWS[1:2]}, indent=2))
    with pytest.raises(UserError, match="a.json: holds the splits train, test; name one with `split`"):
        prompts(tmp_path / "a.json")
    assert prompts(tmp_path / "a.json", split="test") == ["p1"]


REFUSED = {
    '"rows"': "JSON, but str and no rows; give a list of objects, or one a line",
    '{"prompt": {"0": "a", "1": "b"}, "chosen": {"0": "c", "1": "d"}}': "a table by columns, as pandas writes it",
    '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}\n': r"row 1: .*`chosen` is there twice",
    '[{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}]': "`chosen` is there twice",
    '{"prompt": "a", "chosen": [{"role": "user", "role": "x"}], "rejected": "b"}': "`role` is there twice",
    '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": Infinity}\n': "Infinity is no number",
    '{"prompt": "a",\n "chosen": "b"\n "rejected": "c"}': r"not valid JSON \(Expecting ',' delimiter at character 33\)",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=str)
def test_json_that_cannot_be_rows_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a.json.*{message}"):
        prompts(tmp_path / "a.json")


def test_nan_in_place_of_a_column_is_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES.replace("}", ', "margin": NaN, "images": NaN}'))
    assert [row.meta for row in read_source(str(tmp_path / "a.jsonl")).rows] == [{}] * 4


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, ending):
    table = pyarrow.table([["p"], ["a"], ["b"], ["c"]], names=["prompt", "chosen", "rejected", "chosen"])
    file = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        pyarrow.feather.write_feather(table, file, compression="uncompressed")
    with pytest.raises(UserError, match=f"a.{ending}: the column `chosen` is there twice"):
        prompts(file)
    file.write_bytes(b"no table")
    with pytest.raises(UserError, match=f"a.{ending}: not a {ending.capitalize()} file, or a broken one"):
        prompts(file)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS[:2])),
        ("a.json", json.dumps(ROWS[:2])),
        ("a.json", json.dumps(ROWS[0], indent=2)),
        ("a.json", json.dumps({"data": ROWS[:2]})),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS[:2])),
        ("a.parquet", None),
    ],
)
def test_a_split_or_revision_that_a_file_here_cannot_have_is_refused(tmp_path, name, text):
    path = tmp_path / name
    if text is None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:2]), path)
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=f"{name}: holds no splits, so that `split` 'test' would choose nothing; leave"):
        read_source(str(path), split="test")
    assert read_source(str(path)).rows == read_source(str(path), split="a").rows, "its own name chooses it"
    for place in (path, tmp_path):
        with pytest.raises(UserError, match="is on this machine, and `revision` is of a hub data set; leave it out"):
            read_source(str(place), revision="main")
