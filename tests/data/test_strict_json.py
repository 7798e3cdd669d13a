"""JSON, tables and texts of them lose nothing: a key twice, a number that is none and nesting without end are told."""

import json
import struct

import pyarrow
import pyarrow.parquet
import pytest
from conftest import CHATML

from align.data import read_source
from align.data.bad_row import LONGEST, BadRow, shown
from align.data.delimited import listed_cell, typed_cell
from align.data.formats import read_row
from align.data.strict_json import DEEPEST, is_deep, literal, loads
from align.data.texts import Template, read_chat_template
from align.errors import UserError
from align.files import with_home
from align.shipped import template_file

PAIR = '"prompt": "q", "chosen": "a", "rejected": "b"'
ASKED = [{"role": "user", "content": "q"}]


def nested(depth, opened="[", closed="]"):
    return opened * depth + closed * depth


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 1}', "`a` is there twice"),
        ('[{"b": {"c": 1, "c": 2}}]', "`c` is there twice"),
        ("[Infinity]", "Infinity is no number"),
        ("-Infinity", "-Infinity is no number"),
        (nested(DEEPEST + 1), f"nested deeper than {DEEPEST}"),
        (nested(100_000), f"nested deeper than {DEEPEST}"),
        ('{"a":' * 400 + "1" + "}" * 400, f"nested deeper than {DEEPEST}"),
    ],
)
def test_what_json_would_lose_is_told(text, said):
    with pytest.raises(ValueError, match=said):
        loads(text)


@pytest.mark.parametrize(
    "text", ["{'a': 1, 'a': 2}", "[{'b': {1: 0, 1: 1}}]", nested(200), nested(9000), "{[]: 1}", "f()"]
)
def test_what_pythons_spelling_would_lose_is_told(text):
    with pytest.raises(ValueError):
        literal(text)
    assert listed_cell(text) == text, "it stays text, which no reader takes for a list"


@pytest.mark.parametrize("text", ['{"a": [1, null, {"b": "\\u00e9"}]}', nested(DEEPEST), "[NaN]", "3", '"x"'])
def test_everything_else_is_as_json_has_it(text):
    assert repr(loads(text)) == repr(json.loads(text))
    assert repr(literal("{'a': [1, None, {'b': 2}]}")) == "{'a': [1, None, {'b': 2}]}"


@pytest.mark.parametrize("depth", [1, 2, DEEPEST, DEEPEST + 1, DEEPEST + 2, 5000])
def test_depth_is_counted_by_lists_and_objects(depth):
    value = "leaf"
    for k in range(depth):
        value = {"a": value, "b": 1} if k % 2 else [0, value, "x"]
    assert is_deep(value) == (depth > DEEPEST)


@pytest.mark.parametrize("number", ["9" * 4300, "9" * 4301, "9" * 10**5, "-" + "9" * 5000, "1e" + "9" * 5000])
def test_a_cell_of_digits_without_end_is_text(number):
    assert typed_cell(number) == (number if len(number) > 4300 else int(number))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{" + PAIR + ', "prompt": "r"}', "not valid JSON (`prompt` is there twice); mend or remove the row"),
        ("{" + PAIR + ', "x": ' + nested(150) + "}", "nested deeper than 100; mend or remove the row"),
        ("{" + PAIR + ', "x": ' + nested(90_000) + "}", "not valid JSON (nested deeper than 100)"),
        ("{" + PAIR + ', "x": ' + "9" * 5000 + "}", "not valid JSON (a number of more digits than Python reads)"),
        ("{" + PAIR + ', "id": "\\ud800"}', "field id: holds half a character (a lone surrogate); mend the text"),
        ("{" + PAIR + ', "k\\udfff": 1}', "field a column's name: holds half a character"),
        ('{"prompt_ids": [1], "completions": ["a", "b"]}', "field completion_ids: missing (found: completions)"),
        ('{"prompt_ids": [%s], "chosen_ids": [1], "rejected_ids": [2]}' % ("9" * 400), "is no token id"),
        ('{"prompt": "q", "output_1": "a", "output_2": "b", "preference": %s}' % ("9" * 400), "give 1, 2 or tie"),
        ('{"prompt": "q", "completion": "a", "label": 1e400}', "inf is neither true nor false"),
    ],
)
def test_a_row_that_no_one_can_read_is_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text("{" + PAIR + "}\n" + line + "\n")
    with pytest.raises(UserError) as refusal:
        read_source(str(path))
    assert str(refusal.value).startswith(f"{path}, row 2")
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 2000, "a number of thousands of digits is not shown whole"


def test_arguments_of_a_call_with_a_key_twice_are_refused():
    call = {"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(BadRow, match="`x` is there twice"):
        read_row({"prompt": ASKED, "chosen": said, "rejected": "b"}, "rows.jsonl", 1)


def test_a_byte_order_mark_and_nul_characters_change_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "q\\u0000", "chosen": "a", "rejected": "b"}\n')
    assert read_source(str(path)).rows[0].prompt == "q\x00"


@pytest.mark.parametrize("kind", ["column", "key"])
def test_a_column_or_a_key_that_a_table_has_twice_is_named(tmp_path, kind):
    ones = pyarrow.array(["a"])
    twice = pyarrow.StructArray.from_arrays([ones, ones], names=["x", "x"])
    lists = pyarrow.ListArray.from_arrays([0, 1], twice)
    arrays, names = ([ones, ones], ["q", "q"]) if kind == "column" else ([ones, lists], ["q", "m"])
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), path)
    with pytest.raises(UserError, match=f"the column `{'q' if kind == 'column' else 'm.x'}` is there twice"):
        read_source(str(path))


def test_an_arrow_file_whose_offsets_lead_out_of_it_is_damaged_and_ends_no_process(tmp_path):
    table = pyarrow.table({"prompt": ["a" * 40, "b" * 40]})
    path = tmp_path / "rows.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    offsets, wrong = struct.pack("<3i", 0, 40, 80), struct.pack("<3i", 0, 40, 2**30)
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, wrong))
    with pytest.raises(UserError, match="fetch the file again"):
        read_source(str(path))


def test_a_mapping_of_rows_of_which_some_hold_no_object_there_is_told_of_the_row(tmp_path):
    sides = {"chosen": "It is a.", "rejected": "It is b."}  # whose common beginning would be taken for the prompt
    rows = [{"q": {"text": "q"}, **sides}, {"q": "q", **sides}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"row 2, field q.text: missing, and the source's `columns` has `prompt` there"):
        read_source(str(path), columns={"prompt": "q.text", "chosen": "chosen"})


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[9].x.y }}", "{{ '%s' % () }}"],
)
def test_whatever_a_chat_template_raises_is_a_refusal(byte_level, template):
    with pytest.raises(ValueError, match="the chat template refuses the conversation"):
        Template(byte_level, template, {}).before_answer(ASKED)
    assert Template(byte_level, CHATML, {}).before_answer(ASKED)


def test_what_is_shown_of_a_row_is_a_line_of_bounded_length():
    assert shown("a\nb\x00\ud800") == "a\\nb\\x00\\ud800"
    long = shown("x" * 10_000)
    assert len(long) == LONGEST + len(" ... ")


@pytest.mark.parametrize("name", ["x" * 300, "data/" + "x" * 300, "~nobody-at-all/rows.jsonl", "a\x00b.jsonl"])
def test_a_name_that_no_file_can_have_is_no_such_file(name):
    with pytest.raises(UserError, match="no such|neither"):
        read_source(name)
    assert template_file(name) == with_home(name)
    with pytest.raises(UserError, match="there is no file|no such file"):
        read_chat_template(name)
