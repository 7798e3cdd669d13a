"""Malformed input, each with the message a user gets."""

import gzip
import json
from copy import deepcopy

import pyarrow.parquet
import pytest
from read_rows import read_rows

from align.data import read_source
from align.errors import UserError

GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
KNOWN = (
    "{prompt_ids, completions_ids, grades}; {prompt, completions, prompt_ids, completion_ids, rewards}; "
    "{prompt, items: [{text, score}]}; "
    "{prompt, completions, grades | rewards | ranks}; {prompt, chosen: [...], rejected: [...]}; "
    "{chosen, rejected} of dialogue text; {chosen, rejected}; "
    "{prompt, chosen, rejected}; {prompt, completion, label}; {messages, label}"
)
NUMBER = "give a number, larger for a better completion"
FINITE = "give a finite number, or remove the completion"
PER_COMPLETION = "give one number per completion"

# line: what follows "rows.jsonl, row 2"
BAD = {
    b'{"prompt": "p", ': ": not valid JSON (Expecting property name enclosed in double quotes at character 18); "
    "mend or remove the row",
    b'{"prompt": "caf\xe9"}': ": not UTF-8 (byte 16 of the row); save the file as UTF-8",
    b'["p", "a", "b"]': ": list, not an object; give one JSON object with named fields per row",
    b'{"quest": "p", "a": 1}': f": unknown format (columns: quest, a); known formats: {KNOWN}",
    b'{"question": "p", "a": 1}': ", field completions: missing (columns: question, a); "
    "give `completions`, or `chosen` and `rejected`",
    b'{"chosen": 1, "rejected": "b"}': ", field chosen: chosen and rejected are not both text or both messages; "
    "give them in one form",
    b'{"completions": ["a", "b"], "grades": [1, 0]}': ", field prompt: missing (other columns: grades); "
    "give a `prompt` or `messages` column",
    b'{"prompt": "p", "grades": [1, 0]}': ", field completions: missing (columns: prompt, grades); "
    "give `completions`, or `chosen` and `rejected`",
    b'{"prompt": "p", "chosen": "a"}': ", field rejected: missing (found: nothing); give `rejected`, or remove the row",
    b'{"prompt": "", "chosen": "a", "rejected": "b"}': ", field prompt: empty; "
    "give at least the tokenizer's start token as text, or remove the row",
    b'{"prompt": 5, "chosen": "a", "rejected": "b"}': ", field prompt: a number, not text, messages or token ids; "
    "give text or a list of messages",
    b'{"prompt": "p", "completions": "ab", "grades": [1, 0]}': ", field completions: text, not a list; "
    "give a list with one entry per completion",
    b'{"prompt": "p", "completions": [], "grades": []}': ", field completions: an empty list; "
    "give at least one completion, or remove the row",
    b'{"prompt": "p", "completions": ["a", 3], "grades": [1, 0]}': ", field completions[1]: a number, "
    "not text, messages or token ids; give text or a list of messages",
    b'{"prompt": "p", "completions": ["a", "b"], "grades": [1, NaN]}': f", field grades[1]: the value is nan; {FINITE}",
    b'{"prompt": "p", "completions": ["a", "b"], "scores": [1e999, 0]}': f", field scores[0]: the value is inf; "
    f"{FINITE}",
    b'{"prompt": "p", "completions": ["a", "b"], "grades": [1, 2, 3]}': ", field grades: 3 entries for 2 completions; "
    f"{PER_COMPLETION}",
    b'{"prompt": "p", "completions": ["a", "b"], "grades": ["good", "bad"]}': f", field grades[0]: text, not a number; "
    f"{NUMBER}",
    b'{"prompt": "p", "completions": ["a", "b"], "grades": [true, false]}': ", field grades[0]: a boolean, "
    f"not a number; {NUMBER}",
    b'{"prompt": "p", "completions": ["a", "b"], "ranks": [1, null]}': f", field ranks[1]: null, not a number; "
    f"{NUMBER}",
    b'{"prompt": "p", "completions": ["a", "b"], "grades": 1}': f", field grades: a number, not a list of numbers; "
    f"{PER_COMPLETION}",
    b'{"prompt": "p", "items": [{"text": "a", "score": 1}, {"text": "b"}]}': ", field items[1].score: missing "
    "(found: text); give `score`, or remove the row",
    b'{"prompt": "p", "items": [{"words": "a", "score": 1}]}': ", field items[0]: no text (keys: words, score); "
    "name it one of text, completion, response, answer, content",
    b'{"prompt": [{"from": "human", "text": "p"}], "chosen": "a", "rejected": "b"}': ", field prompt[0]: "
    "a message with the keys role, text; name them `role` and `content`",
    b'{"prompt": [{"role": "narrator", "content": "p"}], "chosen": "a", "rejected": "b"}': ", field prompt[0].role: "
    "unknown role 'narrator'; use one of system, developer, user, assistant, tool",
    b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"}': ", field "
    "prompt[0].content[0]: a part of type 'image', not text; only text, reasoning, tool calls and their results are "
    "read; give text, or remove the row",
    b'{"prompt": [{"role": "user", "tool_calls": [{"name": "f"}]}], "chosen": "a", "rejected": "b"}': ", field "
    "prompt[0]: a tool call of the user's; only the assistant calls tools; mend or remove the row",
    b'{"prompt": "p", "images": ["x.png"], "chosen": "a", "rejected": "b"}': ", field images: "
    "images, audio and video are not supported; remove the column",
    b'{"prompt": "p", "tools": [{"name": "f"}], "chosen": "a", "rejected": "b"}': ", field tools: "
    "tools beside a prompt that is no conversation; give the prompt as messages",
    b'{"prompt": "p", "completion": "c", "label": "good"}': ", field label: 'good' is neither true nor false; "
    "give true for a good completion, else false",
    b'{"prompt": "p", "completions": [[{"role": "user", "content": "a"}]]}': ", field completions[0]: "
    "messages of user; give one assistant message, and earlier turns in the prompt",
    b'{"messages": [{"role": "user", "content": "p"}], "label": true}': ", field messages: "
    "the last message is not the assistant's; end with the completion to learn from",
    b'{"messages": "p", "label": true}': ", field messages: not a list of messages; "
    "give a list of objects with `role` and `content`",
    b'{"prompt": "p", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], '
    b'"rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}': ", field chosen: "
    "a conversation without the text of `prompt`; give the assistant's message alone, or leave it out with "
    "data.ignore=[prompt] (without a recipe --ignore prompt)",
    b'{"prompt": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}': ", field input: "
    "it looks like the prompt and would stay unread; put all of the prompt in one column, `prompt`, or leave it out "
    "with data.ignore=[input] (without a recipe --ignore input)",
    b'{"prompt": "p", "completions": ["a", "b"], "scores": [1, 0], "ranks": [2, 1]}': ", field ranks: it orders the "
    "completions unlike `scores`, which is read; keep one of the two, or leave it out with data.ignore=[ranks] "
    "(without a recipe --ignore ranks)",
    b'{"prompt": "[{\\"role\\": \\"user\\", \\"content\\": \\"p\\"}]", "chosen": "a", "rejected": "b"}': ", "
    "field prompt: a conversation written as text; give it as a list of messages, not as its JSON",
    b'{"prompt": "p", "chosen": [{"role": "assistant", "content": "a", "weight": 0}], "rejected": "b"}': ", field "
    "chosen: every message of the assistant's has the weight 0; nothing is learnt; remove the row",
    b'{"system": "s", "prompt": [{"role": "system", "content": "t"}, {"role": "user", "content": "p"}], "chosen": "a", '
    b'"rejected": "b"}': ", field system: another text than the conversation's own system message; keep one of the two",
    b'{"system": "s", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}': ", field system: "
    "a system text beside token ids; give the prompt's ids with it, and no `system`",
    b'{"prompt_ids": [1, -2], "completion_ids": [3]}': ", field prompt_ids: -2 is no token id; "
    "give ids of the model's own tokenizer",
    b'{"prompt_ids": [1, 2], "completions_ids": [[3], "b"]}': ", field completions_ids: token ids beside text; "
    "give prompt and completions both as token ids or as text",
    b'{"messages": [{"role": "user"}], "chosen": "a", "rejected": "b"}': ", field messages[0]: "
    "a message with the keys role; name them `role` and `content`",
    b'{"instruction": "p", "completions": [{"response": 4, "overall_score": 1}]}': ", field completions[0].response: "
    "a number, not text, messages or token ids; give text or a list of messages",
    b'{"prompt": "p", "items": [{"text": "a", "rank": 1}, {"text": "b", "rank": "2nd"}]}': ", field items[1].rank: "
    f"text, not a number; {NUMBER}",
    b'{"prompt": "p", "responses": ["a", 3], "rewards": [1, 0]}': ", field responses[1]: a number, "
    "not text, messages or token ids; give text or a list of messages",
    b'{"prompt": "p", "chosen": "a", "rejected": [{"role": "assistant"}]}': ", field rejected[0]: "
    "a message with the keys role; name them `role` and `content`",
    b'{"prompt": "p", "completion": "c", "score": "high"}': f", field score: text, not a number; {NUMBER}",
    b'{"prompt": "p", "completions": ["a", "b"], "ranks": [1, false]}': ", field ranks[1]: a boolean, not a number; "
    f"{NUMBER}",
    b'{"prompt": "p", "meta": 3, "chosen": "a", "rejected": "b"}': ", field meta: not an object; "
    "give an object of named values",
}


@pytest.mark.parametrize("line", BAD)
def test_message_of_a_malformed_row(line, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + line + b"\n")
    with pytest.raises(UserError) as refusal:
        read_source(str(file))
    assert str(refusal.value) == f"{file}, row 2{BAD[line]}"


def test_further_malformed_rows_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b"{\n\n3\n[]\n")
    with pytest.raises(UserError, match=r"rows.jsonl, row 2: not valid JSON .* \(and 2 more malformed rows\)$"):
        read_source(str(file))


def test_truncated_gzip(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(GOOD * 50)[:-4])  # within the checksum
    with pytest.raises(UserError) as refusal:
        read_source(str(file))
    ended = "Compressed file ended before the end-of-stream marker was reached"
    assert str(refusal.value) == f"{file}: broken gzip data after row 50 ({ended}); fetch the file again"


def test_not_gzip_at_all(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(GOOD)
    with pytest.raises(UserError) as refusal:
        read_source(str(file))
    assert (
        str(refusal.value)
        == f"{file}: broken gzip data after row 0 (Not a gzipped file (b'{{\"')); fetch the file again"
    )


def test_broken_parquet(tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"rows.parquet: not a Parquet file, or a broken one \(.*\); fetch the file"):
        read_source(str(file))


def test_parquet_with_damaged_pages(tmp_path):
    """The first row group is whole, the second's header is not."""
    file = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": ["p"] * 2000, "chosen": ["a"] * 2000, "rejected": ["b"] * 2000})
    pyarrow.parquet.write_table(table, file, row_group_size=1000)
    column = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    begin = column.dictionary_page_offset
    content[begin : begin + 10] = b"\xff" * 10
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"rows.parquet: broken Parquet data after row 1000 \(.*\); fetch the file again"
    ):
        read_source(str(file))


def test_broken_json_file(tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(b'[{"prompt": "p"')
    with pytest.raises(UserError) as refusal:
        read_source(str(file))
    problem = "not valid JSON (Expecting ',' delimiter at character 16); mend or remove the row"
    assert str(refusal.value) == f"{file}: {problem}"


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_nothing_to_read(tmp_path, content):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_source(str(file))
    assert str(refusal.value) == f"{file}: no rows; give a source that holds some"


def prepared(tmp_path, tokenizer, *rows, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(str(file), eval_fraction=0.0, tokenizer=tokenizer, **options)


CHAT = {"messages": [{"role": "user", "content": "p"}], "chosen": "a", "rejected": "b"}
UNFIT = {
    "a single completion": (
        [{"prompt": "p", "completion": "a", "label": True}] * 2,
        {},
        "{file}, row 1, field completions: 1 completion, and learning from preferences needs 2 or more; "
        "give more, or train with `objective: {{name: kto}}` or `task: sft` (and 1 more malformed row)",
    ),
    "a pair for an objective of lists": (
        [{"prompt": "p", "completions": ["a", "b"], "grades": [1, 0]}],
        {"min_completions": 3},
        "{file}, row 1, field completions: 2, and the objective needs lists of 3 or more; "
        "give more, or take an objective of pairs such as `logistic`",
    ),
    "no grades": (
        [{"prompt": "p", "completions": ["a", "b"]}],
        {},
        "{file}, row 1, field grades: missing; give `grades`, `rewards`, `scores` or `ranks`, one per completion",
    ),
    "no chat template": (
        [CHAT],
        {},
        "{file}, row 1, field prompt: a conversation, and the tokenizer has no chat template; "
        "set `policy.chat_template: plain` (without a recipe --chat-template plain)",
    ),
    "a template that refuses": (
        [CHAT],
        {"chat_template": "{{ raise_exception('no system turn') }}"},
        "{file}, row 1: the chat template refuses the conversation (no system turn); "
        "mend the row or `policy.chat_template`",
    ),
    "ids beyond the vocabulary": (
        [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [70000]}],
        {},
        "{file}, row 1, field prompt_ids: token id 70000 is beyond the vocabulary of 260; "
        "use the policy's own tokenizer",
    ),
    "nothing left": (
        [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "much too long", "chosen": "a", "rejected": "b"}],
        {"max_length": 5},
        "data.sources: no training row is left of 2 (1 all completions identical, 1 prompt fills max_length); "
        "mend them or add others",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_message_of_rows_that_do_not_fit_the_run(case, tmp_path, byte_level):
    rows, options, message = UNFIT[case]
    with pytest.raises(UserError) as refusal:
        prepared(tmp_path, byte_level, *rows, **options)
    assert str(refusal.value) == message.format(file=tmp_path / "rows.jsonl")


def test_a_tokenizer_without_an_end_token(tmp_path, byte_level):
    tokenizer = deepcopy(byte_level)
    tokenizer.eos_token = None
    with pytest.raises(UserError) as refusal:
        prepared(tmp_path, tokenizer, {"prompt": "p", "chosen": "a", "rejected": "b"})
    message = "data.append_eos: the tokenizer has no end-of-text token; set `data.append_eos: false`"
    assert str(refusal.value) == message


HALF = "\ud83d"
BROKEN_ROWS = {
    "chosen": {"prompt": "p", "chosen": f" a {HALF}", "rejected": " b"},
    "prompt": {"prompt": f"p{HALF}", "completions": ["a", "b"], "grades": [1, 0]},
    "completions[1]": {"prompt": "p", "completions": ["a", HALF], "grades": [1, 0]},
    "messages[0].content": {"messages": [{"role": "user", "content": HALF}, {"role": "assistant", "content": "a"}]},
    "messages[0].role": {"messages": [{"role": HALF, "content": "p"}, {"role": "assistant", "content": "a"}]},
    "messages[1].name": {
        "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a", "name": HALF}]
    },
    "completion.reasoning_content": {
        "prompt": [{"role": "user", "content": "p"}],
        "completion": {"role": "assistant", "content": "a", "reasoning_content": HALF},
        "label": True,
    },
    "completions[0].text": {"prompt": "p", "completions": [{"text": HALF, "score": 1}, {"text": "b", "score": 0}]},
    "messages[0]'s name": {
        "messages": [{"role": "user", "content": "p", HALF: 1}, {"role": "assistant", "content": "a"}]
    },
    "id": {"id": HALF, "prompt": "p", "chosen": "a", "rejected": "b"},
    "label": {"prompt": "p", "completion": "a", "label": HALF},
    "grades[0]": {"prompt": "p", "completions": ["a", "b"], "grades": [HALF, 0]},
    "subset": {"prompt": "p", "chosen": "a", "rejected": "b", "subset": HALF},
    "meta.tags[1]": {"prompt": "p", "chosen": "a", "rejected": "b", "meta": {"tags": ["x", HALF]}},
    "a column's name": {"prompt": "p", "chosen": "a", "rejected": "b", HALF: 1},
    "chat_template_kwargs.style": {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "chat_template_kwargs": {"style": HALF},
    },
}


@pytest.mark.parametrize("field", BROKEN_ROWS)
def test_half_a_character_anywhere_in_a_row_is_refused_with_its_field(field, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + json.dumps(BROKEN_ROWS[field]).encode() + b"\n")
    with pytest.raises(UserError) as caught:
        read_source(str(path))
    assert (
        str(caught.value) == f"{path}, row 2, field {field}: holds half a character (a lone surrogate); mend the text"
    )
    str(caught.value).encode()  # a terminal can show it


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rb'{"prompt": "p \ud83d\ude00", "chosen": "a", "rejected": "b"}' + b"\n")
    assert read_source(str(path)).rows[0].prompt == "p \U0001f600"
