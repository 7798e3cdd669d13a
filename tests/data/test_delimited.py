"""CSV and TSV: what a spreadsheet, pandas and R write is read as the same rows from JSON lines are."""

import csv
import gzip
import io
import json

import pytest

from align.data import read_source
from align.errors import UserError

TEXTS = (
    "Say hi.",
    'He said "hi", then\nleft;\tso it goes',
    "Grüße, 世界",
    "42",
    "007",
    "true",
    " spaced ",
    "[not a list",
)
ROWS = [{"prompt": f"q{k}: {text}", "chosen": text, "rejected": "no"} for k, text in enumerate(TEXTS)]


def write(path, rows, *, delimiter=",", encoding="utf-8", quoting=csv.QUOTE_MINIMAL):
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(text, names, delimiter=delimiter, quoting=quoting)
    table.writeheader()
    table.writerows(rows)
    content = text.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path, **options):
    found = read_source(str(path), **options)
    return [(row.prompt, row.completions, row.grades, row.rewards, row.meta, row.number) for row in found.rows]


def as_lines(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(path)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz", "rows.tsv.gz"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_texts_are_what_they_were_written_as(tmp_path, name, delimiter, encoding, quoting):
    path = write(tmp_path / name, ROWS, delimiter=delimiter, encoding=encoding, quoting=quoting)
    assert read(path) == as_lines(tmp_path, ROWS)


NUMBERED = [
    [{"prompt": "q", "completion": "42", "label": label} for label in (True, False, 1, 0)],
    [{"prompt": "q", "completion": "42", "score": score} for score in (1, 0.5, -3, 1e-3)],
    [{"prompt": "q", "chosen": "1", "rejected": "2", "score_chosen": 4.5, "score_rejected": 2}],
    [
        {
            "prompt": "q",
            "response": "1",
            **dict.fromkeys(["helpfulness", "correctness", "coherence", "complexity", "verbosity"], 3),
        }
    ],
    [{"history": "q", "human_ref_A": "1", "human_ref_B": "2", "labels": 0, "score_A": 1, "score_B": 2}],
    [{"prompt": "q", "response_0": "1", "response_1": "2", "better_response_id": 1, "safer_response_id": 0}],
    [{"context": "q", "response1": "1", "response2": "2", "overall_preference": -2}],
]


@pytest.mark.parametrize("rows", NUMBERED)
def test_numbers_are_numbers_where_the_column_is_a_grade(tmp_path, rows):
    path = write(tmp_path / "rows.csv", rows)
    found, expected = read(path), as_lines(tmp_path, rows)
    assert [row[:4] for row in found] == [row[:4] for row in expected]


LISTED = {
    "prompt": "q",
    "completions": ["1", "two, or so"],
    "rewards": [1.5, 0],
}


@pytest.mark.parametrize("spelt", [json.dumps, repr])
def test_lists_and_conversations_in_a_cell(tmp_path, spelt):
    chat = [{"role": "user", "content": 'It\'s "q"?'}]
    rows = [LISTED, {**LISTED, "prompt": chat}]
    cells = [{name: own if isinstance(own, str) else spelt(own) for name, own in row.items()} for row in rows]
    assert read(write(tmp_path / "rows.csv", cells)) == as_lines(tmp_path, rows)


def test_an_empty_cell_is_absent_and_a_column_without_a_name_is_pandas_index(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",prompt,chosen,rejected,system,label\n0,q,a,b,,\n\n1,r,c,d,Be kind.,\n")
    found = read_source(str(path)).rows
    assert [row.prompt for row in found] == ["q", "Be kind.\n\nr"]
    assert [row.meta for row in found] == [{"Unnamed: 0": "0"}, {"Unnamed: 0": "1"}]
    assert [row.number for row in found] == [1, 2]


def test_an_answer_longer_than_the_csv_modules_own_limit(tmp_path):
    rows = [{"prompt": "q", "chosen": "a" * 200_000, "rejected": "b"}]
    assert read(write(tmp_path / "rows.csv", rows)) == as_lines(tmp_path, rows)


HEAD = b"prompt,chosen,rejected\nq,a,b\n"
QUOTING = "put a text with quotes, delimiters or line breaks in quotes, and write each quote in it twice"
BROKEN = {
    HEAD + b"q,a,b,c\n": ", row 2: 4 cells for 3 columns; put texts that hold the delimiter in quotes",
    HEAD + b"q,a\n": ", row 2: 2 cells for 3 columns; put texts that hold the delimiter in quotes",
    HEAD + b"q,\xff,b\n": ", row 2, field chosen: not UTF-8; save the file as UTF-8",
    HEAD + b'q,"a,b\n': f": broken quoting after row 1 (unexpected end of data); {QUOTING}",
    HEAD + b'q,"a" b,c\n': f": broken quoting after row 1 (',' expected after '\"'); {QUOTING}",
    HEAD + b"q,,b\n": ", row 2, field chosen: missing (found: rejected); give `chosen`, or remove the row",
    b"prompt,chosen,chosen\n": ": the column `chosen` is there twice; rename or remove one",
    b"": ": no rows; give a source that holds some",
    HEAD[:23]: ": no rows; give a source that holds some",
    b"prompt,completion,score\nq,a,high\n": ", row 1, field score: text, not a number; "
    "give a number, larger for a better completion",
    b'prompt,chosen,rejected\n"q",a,"[{""role"": ""assistant""}]"\n': ", row 1, field rejected[0]: "
    "a message with the keys role; name them `role` and `content`",
    b"\xff\xfea": ": looks like UTF-16, but is not (truncated data); save it as UTF-8",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_gets_one_sentence(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_source(str(path))
    assert str(refusal.value) == f"{path}{BROKEN[content]}"


def test_truncated_gzip(tmp_path):
    path = write(tmp_path / "rows.csv.gz", ROWS * 50)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"rows.csv.gz: broken gzip data after row 400 \(.*\); fetch the file again"):
        read_source(str(path))


def test_a_folder_of_shards(tmp_path):
    write(tmp_path / "train-00000-of-00002.csv", ROWS[:3])
    write(tmp_path / "train-00001-of-00002.csv", ROWS[3:])
    write(tmp_path / "test.csv", ROWS[:1])
    assert len(read(tmp_path, split="train")) == len(ROWS)
    assert len(read(tmp_path / "test.csv", split="test")) == 1
    with pytest.raises(UserError, match="holds no splits"):
        read(tmp_path / "test.csv", split="train")
