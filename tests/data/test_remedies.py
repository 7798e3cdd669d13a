"""Small files that people have: what is refused says what to type, and nothing that a format made is called unread."""

import json
from dataclasses import replace

import pytest

from align.data.audit import Audit, audit_rows, in_one_line
from align.data.bad_row import BadRow
from align.data.formats import read_row
from align.data.sources import read_source

ASKED = [{"role": "user", "content": "Which fruit is yellow?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "The lemon."}]


def read(**columns):
    return read_row(columns, "rows.jsonl", 3)


@pytest.mark.parametrize(
    ("names", "mapping", "options"),
    [
        (
            ("question", "good", "bad"),
            "`columns: {chosen: good, rejected: bad}`",
            "--column chosen=good --column rejected=bad",
        ),
        (
            ("ask", "good one", "bad"),
            "`columns: {prompt: ask, chosen: good one, rejected: bad}`",
            "--column prompt=ask --column 'chosen=good one' --column rejected=bad",
        ),
    ],
)
def test_unknown_names_are_answered_with_the_line_that_says_what_they_are(names, mapping, options):
    with pytest.raises(BadRow) as refused:
        read(**dict(zip(names, ("q", "a", "b"), strict=True)))
    assert mapping in refused.value.remedy
    assert options in refused.value.remedy


def test_texts_too_few_or_too_many_for_a_pair_are_given_no_line():
    for columns in ({"question": "q", "good": "a"}, {"question": "q", "good": "a", "bad": "b", "odd": "c"}):
        with pytest.raises(BadRow) as refused:
            read(**columns)
        assert "columns: {" not in refused.value.remedy


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_conversation_that_has_its_answer_beside_a_pair_is_refused_by_its_own_name(column):
    spelled = [{"from": own["role"], "value": own["content"]} for own in ANSWERED]
    with pytest.raises(BadRow) as refused:
        read(**{column: ANSWERED if column == "messages" else spelled}, chosen=" A banana.", rejected=" A plum.")
    assert refused.value.field == column
    assert "call the column `prompt`" in refused.value.remedy
    assert read(prompt=ANSWERED, chosen=" Or a banana.", rejected=" Or a plum.").prompt == ANSWERED
    assert read(messages=ASKED, chosen="A banana.", rejected="A plum.").prompt == ASKED


@pytest.mark.parametrize(
    ("winner", "grades"), [("A", (1.0, 0.0)), ("b", (0.0, 1.0)), ("response_b", (0.0, 1.0)), ("Tie", (0.5, 0.5))]
)
def test_who_won_may_be_called_by_its_letter_or_its_column(winner, grades):
    assert read(prompt="q", response_a="x", response_b="y", winner=winner).grades == grades


NUMBERED = {"instruction": "q", "output_1": "x", "output_2": "y"}
FROM_0 = {"prompt": "q", "answer_0": "x", "answer_1": "y"}
LETTERS = {"question": "q", "answer_a": "x", "answer_b": "y"}


@pytest.mark.parametrize(
    ("row", "grades"),
    [
        ({**NUMBERED, "preference": 1}, (1.0, 0.0)),
        ({**NUMBERED, "preference": 2.0}, (0.0, 1.0)),
        ({**NUMBERED, "preference": 1.5}, (0.5, 0.5)),
        ({**NUMBERED, "preference": 0}, (0.5, 0.5)),
        ({**NUMBERED, "preference": 1.75}, (2 - 1.75, 1.75 - 1)),
        ({**NUMBERED, "winner": "1"}, (1.0, 0.0)),
        ({**NUMBERED, "winner": 2}, (0.0, 1.0)),
        ({**NUMBERED, "label": " 2 "}, (0.0, 1.0)),
        ({**NUMBERED, "winner": "output_2"}, (0.0, 1.0)),
        ({**NUMBERED, "winner": "Tie"}, (0.5, 0.5)),
        ({"input": "q", "output_1": "x", "output_2": "y", "label": 1}, (1.0, 0.0)),
        ({"prompt": "q", "response1": "x", "response2": "y", "better": 2}, (0.0, 1.0)),
        ({**FROM_0, "winner": 0}, (1.0, 0.0)),
        ({**FROM_0, "label": 1}, (0.0, 1.0)),
        ({**LETTERS, "winner": "B"}, (0.0, 1.0)),
    ],
)
def test_a_verdict_is_the_ending_of_the_better_ones_column(row, grades):
    found = read(**row)
    assert (found.prompt, found.completions, found.grades) == ("q", ("x", "y"), grades)


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({**NUMBERED, "winner": 0}, "give 1, 2 or tie"),
        ({**NUMBERED, "preference": 2.5}, "give 1, 2 or tie"),
        ({**NUMBERED, "preference": 0.5}, "give 1, 2 or tie"),
        ({**NUMBERED, "preference": True}, "give 1, 2 or tie"),
        ({**NUMBERED, "label": float("nan")}, "give 1, 2 or tie"),
        ({**FROM_0, "winner": 2}, "give 0, 1 or tie"),
        ({**LETTERS, "winner": 1}, "give a, b or tie"),
        ({"prompt": "q", "response_a": "x", "response_b": "y", "winner": 1}, "give A, B or tie"),
        ({"conversation_a": ANSWERED, "conversation_b": ANSWERED, "winner": "2"}, "give A, B or tie"),
    ],
)
def test_a_number_that_may_be_counted_from_0_or_from_1_is_refused_with_what_to_write(row, remedy):
    with pytest.raises(BadRow) as refused:
        read(**row)
    assert refused.value.field in ("winner", "preference", "label")
    assert refused.value.remedy.startswith(remedy)


def test_an_instruction_with_its_input_stands_before_numbered_answers_as_before_others():
    assert read(**{**NUMBERED, "input": "Say it.", "preference": 1}).prompt == "q\nSay it."


@pytest.mark.parametrize("side", ["chosen_tools", "rejected_tools"])
def test_tools_of_one_side_are_told_where_tools_stand(side):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(BadRow) as refused:
        read(prompt=ASKED, chosen="a", rejected="b", **{side: [tool]})
    assert (refused.value.field, "both share the prompt that holds them" in refused.value.problem) == (side, True)
    assert refused.value.remedy.startswith("give the tools that all completions have in `tools`, or")


@pytest.mark.parametrize("key", ["content", "value"])
def test_a_message_of_null_is_told_that_nothing_is_said(key):
    role = "role" if key == "content" else "from"
    with pytest.raises(BadRow) as refused:
        read(prompt=ASKED, chosen=[{role: "assistant", key: None}], rejected=ASKED[0]["content"])
    assert (refused.value.field, refused.value.problem) == (f"chosen[0].{key}", "nothing is said there")


def test_what_a_format_made_is_no_column_that_is_not_read():
    assert read(prompt="q", chosen="a", rejected="b", margin=2.0).unread == ("margin",)  # until an objective reads it
    assert read(prompt="q", chosen="a", rejected="b", kept=2.0).unread == ("kept",)
    assert read(prompt="q", response="r", scores={"helpfulness": 3}).unread == ()


def test_answers_of_a_tree_that_are_left_out_are_no_column_of_the_file(tmp_path):
    reply = {"role": "assistant", "replies": []}
    answers = [{**reply, "text": "a", "rank": 0}, {**reply, "text": "b", "rank": 1}, {**reply, "text": "c"}]
    tree = {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q", "replies": answers}}
    file = tmp_path / "trees.jsonl"
    file.write_text(json.dumps(tree) + "\n")
    [row] = read_source(str(file)).rows
    assert row.meta["left_out"] == 1
    assert "left_out" not in row.unread
    audit = Audit()
    audit_rows(audit, [row, replace(row, id="2")])
    assert "2 answers of trees left out" in in_one_line(audit)
    audit_rows(plain := Audit(), [read(prompt="q", chosen="a", rejected="b", left_out=3)])
    assert plain.answers_left_out == 0
