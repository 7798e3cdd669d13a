"""From sources to tokens in one call: what is used, what is left out and why, and the real sets."""

import json
import random
from pathlib import Path

import pytest
from read_rows import read_rows
from rich.console import Console
from transformers import AutoTokenizer

from align.data import in_one_line, prompt_text, read_chat_template, read_source, render
from align.data.audit import Audit, audit_rows, percentiles
from align.data.config import SourceSection
from align.data.prepare import grade_row
from align.data.schema import Row
from align.errors import UserError

PLAIN = Path(__file__).parents[2] / "recipes" / "templates" / "plain.jinja"
COLUMNS = ["id", "prompt_ids", "completion_ids", "grades", "kept", "weight", "source", "row"]


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSection(path=str(file))


def ranked(prompt, *completions, **more):
    return {"prompt": prompt, "completions": list(completions), "ranks": list(range(len(completions))), **more}


def test_every_row_is_used_or_counted(tmp_path, byte_level):
    source = write(
        tmp_path / "rows.jsonl",
        *[ranked(f"p{n}", "good", "fair", "bad") for n in range(10)],
        ranked("same", "a", "a"),
        {"prompt": "tied", "completions": ["a", "b"], "scores": [2, 2]},
        {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"},
        ranked("much, much too long", "a", "b"),
        ranked("p", "abcdefgh", "a"),
        ranked("q", "abcdefghijk", "abcdefghijkl"),
    )
    audit = read_rows(source, tokenizer=byte_level, max_length=10, overlong="drop_completion").audit
    assert audit.sources[0].refused == {
        "all completions identical": 1,
        "all grades tied": 1,
        "prompt mismatch between chosen and rejected": 1,
        "prompt fills max_length": 1,
        "fewer than 2 completions within max_length": 2,
    }
    assert (audit.read, audit.used, audit.sources[0].used) == (16, 10, 10)
    assert audit.used + sum(audit.refused.values()) == audit.read


def test_all_that_truncation_makes_useless_is_counted(tmp_path, byte_level):
    rows = [ranked("p", "abcdefgh", "abcdefghi"), ranked("q", "ab", "cd")]
    source = write(tmp_path / "rows.jsonl", *rows)
    audit = read_rows(source, eval_fraction=0.0, tokenizer=byte_level, max_length=6).audit
    assert audit.refused == {"all completions identical within max_length": 1}
    tied = {"prompt": "p", "completions": ["ab", "abcdefgh", "cd"], "grades": [1, 0, 1]}
    source = write(tmp_path / "tied.jsonl", tied, rows[1])
    options = {"tokenizer": byte_level, "max_length": 6, "overlong": "drop_completion", "eval_fraction": 0.0}
    assert read_rows(source, **options).audit.refused == {"all grades tied among the completions within max_length": 1}


def test_single_completions_are_used_where_one_is_enough(tmp_path, byte_level):
    rows = [{"prompt": f"p{n}", "completion": "c", "label": n % 2 == 0} for n in range(4)]
    source = write(tmp_path / "rows.jsonl", *rows)
    data = read_rows(source, eval_fraction=0.0, tokenizer=byte_level, min_completions=1)
    assert data.train["grades"] == [[1.0], [0.0], [1.0], [0.0]]
    assert data.audit.refused == {}


def test_columns_and_held_out_rows(tmp_path, byte_level):
    source = write(tmp_path / "rows.jsonl", *[ranked(f"p{n}", "good", "fair", "bad") for n in range(20)])
    data = read_rows(source, eval_fraction=0.2, tokenizer=byte_level, select="best_worst")
    assert data.train.column_names == data.heldout.column_names == COLUMNS
    assert (len(data.train), len(data.heldout)) == (16, 4)
    assert [row.number for row in data.heldout_rows] == data.heldout["row"]
    assert {len(grades) for grades in data.train["grades"]} == {2}
    assert {len(grades) for grades in data.heldout["grades"]} == {3}  # measured on whole lists
    assert data.audit.list_sizes == {2: 16, 3: 4}


def test_weights_follow_the_sources(tmp_path, byte_level):
    one = write(tmp_path / "one.jsonl", ranked("p", "a", "b"))
    two = write(tmp_path / "two.jsonl", ranked("q", "a", "b"))
    sources = [one, SourceSection(path=two.path, weight=2.5)]
    train = read_rows(*sources, eval_fraction=0.0, tokenizer=byte_level).train
    assert dict(zip(train["source"], train["weight"], strict=True)) == {one.path: 1.0, two.path: 2.5}


def test_evaluation_prompts_leave_the_training_rows(tmp_path, byte_level):
    train = write(tmp_path / "train.jsonl", *[ranked(f"p{n}", "a", "b") for n in range(6)])
    evaluation = write(tmp_path / "eval.jsonl", ranked("p2", "x", "y"), ranked("new", "x", "y"))
    data = read_rows(train, eval_sources=(evaluation,), tokenizer=byte_level)
    assert data.train["row"] == [1, 2, 4, 5, 6]
    assert [row.prompt for row in data.heldout_rows] == ["p2", "new"]
    assert data.audit.sources[0].refused == {"prompt is among the evaluation rows": 1}
    assert [(s.part, s.read, s.used) for s in data.audit.sources] == [("train", 6, 5), ("eval", 2, 2)]


def test_held_out_rows_are_those_of_the_held_out_lists(tmp_path, byte_level):
    train = write(tmp_path / "train.jsonl", ranked("p", "a", "b"))
    evaluation = write(tmp_path / "eval.jsonl", ranked("much too long", "x", "y"), ranked("new", "x", "y"))
    data = read_rows(train, eval_sources=(evaluation,), tokenizer=byte_level, max_length=8)
    assert [row.prompt for row in data.heldout_rows] == ["new"]
    assert [byte_level.decode(ids) for ids in data.heldout["prompt_ids"]] == ["<s>new"]


def row(**fields):
    base = {"id": "1", "prompt": "p", "completions": ("a", "b"), "grades": None, "rewards": None, "meta": {}}
    return Row(**{**base, "source": "f", "number": 1, **fields})


def test_explicit_grades_pass_and_rewards_are_graded():
    given = row(grades=(7.0, 3.0), rewards=(0.0, 1.0))
    assert grade_row(given, grades="rank", min_completions=2).grades == (7.0, 3.0)
    assert grade_row(row(rewards=(4.0, 9.0)), grades="rank", min_completions=2).grades == (0.0, 1.0)
    assert grade_row(row(rewards=(4.0, 9.0)), grades="raw", min_completions=2).grades == (4.0, 9.0)
    assert grade_row(row(completions=("a",)), grades="raw", min_completions=1).grades == (1.0,)


def test_audit_counts_what_the_rows_show(tmp_path, byte_level):
    bos = byte_level.bos_token
    source = write(
        tmp_path / "rows.jsonl",
        ranked("p", "a", "b"),
        ranked("p", "b", "a"),  # the same completions in another order
        ranked("q", "a", "a", "b"),
        {"prompt": bos + "r", "completions": ["a", "b", ""], "grades": [1, 1, 0]},
    )
    audit = read_rows(source, eval_fraction=0.0, tokenizer=byte_level, max_length=3).audit
    assert (audit.duplicate_rows, audit.identical_completions, audit.ties, audit.empty_completions) == (1, 1, 1, 1)
    assert (audit.bos_stripped, audit.boundary_rows, audit.completions, audit.list_sizes) == (1, 0, 10, {2: 2, 3: 2})
    # a start token and a letter, then one place for "a" or "b" whose end token does not fit
    assert (audit.truncated_completions, audit.missing_eos, audit.truncated_share) == (9, 9, 0.9)
    assert audit.prompt_tokens == {"p5": 2, "p50": 2, "p90": 2, "p99": 2, "max": 2}
    assert audit.completion_tokens == {"p5": 1, "p50": 2, "p90": 2, "p99": 2, "max": 2}


TALK, PLAIN_TEXT = ranked([{"role": "user", "content": "p"}], "a", "b"), ranked("q", "a", "b")


@pytest.mark.parametrize(("rows", "expected"), [([TALK, PLAIN_TEXT], 1), ([TALK], 0), ([PLAIN_TEXT], 0)])
def test_sources_of_text_beside_sources_of_conversations_are_counted(tmp_path, byte_level, rows, expected):
    """The chat template writes the ones and not the others."""
    sources = [write(tmp_path / f"{k}.jsonl", row) for k, row in enumerate(rows)]
    template = read_chat_template(str(PLAIN))
    audit = read_rows(*sources, eval_fraction=0.0, tokenizer=byte_level, chat_template=template).audit
    assert audit.plain_rows == expected
    assert ("row of text, which no chat template writes" in in_one_line(audit)) == bool(expected)


@pytest.mark.parametrize("rows", [(TALK, TALK, PLAIN_TEXT), (PLAIN_TEXT, {**PLAIN_TEXT, "weight": 0}, TALK)])
def test_text_beside_conversations_in_one_source_names_both_rows_and_the_key(tmp_path, byte_level, rows):
    source = write(tmp_path / "rows.jsonl", *rows)
    text, talk = rows.index(PLAIN_TEXT) + 1, rows.index(TALK) + 1
    template = read_chat_template(str(PLAIN))
    with pytest.raises(UserError) as refusal:
        read_rows(source, eval_fraction=0.0, tokenizer=byte_level, chat_template=template)
    assert str(refusal.value).startswith(f"{source.path}, row {text}: the prompt is text")
    assert f"that of {source.path}, row {talk} is a conversation" in str(refusal.value)
    assert "set `turns: true`" in str(refusal.value)
    turned = source.model_copy(update={"turns": True})
    read = read_rows(turned, eval_fraction=0.0, tokenizer=byte_level, chat_template=template)
    assert read.audit.plain_rows == 0
    assert {row.prompt[0]["role"] for row in read.train_rows} == {"user"}


def test_a_row_of_weight_0_and_token_ids_are_beside_any_form(tmp_path, byte_level):
    ids = {"prompt_ids": [3, 4], "chosen_ids": [5], "rejected_ids": [6]}
    source = write(tmp_path / "rows.jsonl", TALK, {**PLAIN_TEXT, "weight": 0}, ids)
    template = read_chat_template(str(PLAIN))
    audit = read_rows(source, eval_fraction=0.0, tokenizer=byte_level, chat_template=template).audit
    assert (audit.train_lists, audit.refused) == (2, {"weight 0": 1})


RATED = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 1)
SEVERAL = "One?\n<extra_id_1>Assistant\nTwo.\n<extra_id_1>User\nThree?"


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        lambda prompt: [
            {"prompt": prompt, "response": answer, "helpfulness": k, **RATED} for k, answer in enumerate("ab")
        ],
        lambda prompt: [{"prompt": prompt, "response_1": "a", "response_2": "b", "preference_strength": -1}],
    ],
    ids=["helpsteer", "helpsteer2_preference"],
)
def test_helpsteers_prompts_of_one_turn_and_of_several_go_through_one_template(tmp_path, byte_level, row, turns):
    written = write(tmp_path / "rows.jsonl", *row("Zero?"), *row(SEVERAL))
    source = written.model_copy(update={"turns": turns})
    template = read_chat_template(str(PLAIN))
    read = read_rows(source, eval_fraction=0.0, tokenizer=byte_level, chat_template=template)
    asked = [[(own["role"], own["content"]) for own in row.prompt] for row in read.train_rows]
    assert asked == [[("user", "Zero?")], [("user", "One?"), ("assistant", "Two."), ("user", "Three?")]]
    alone = byte_level.apply_chat_template(
        [{"role": "user", "content": "Zero?"}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert byte_level.decode(read.train["prompt_ids"][0]).endswith(alone)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"score_chosen": 2, "score_rejected": 5}, 1),
        ({"score_chosen": 5, "score_rejected": 2}, 0),
        ({"score_chosen": 2, "score_rejected": 2}, 0),
        ({}, 0),
    ],
)
def test_a_pair_whose_rater_prefers_the_other_side_is_counted(tmp_path, byte_level, more, expected):
    source = write(tmp_path / "rows.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b", **more})
    audit = read_rows(source, eval_fraction=0.0, tokenizer=byte_level).audit
    assert audit.rewards_against_grades == expected
    assert ("rewards that order them unlike" in in_one_line(audit)) == bool(expected)


@pytest.mark.parametrize("seed", range(20))
def test_rewards_against_grades_by_every_pair(seed):
    chance = random.Random(seed)
    size = chance.choice([2, 2, 3, 5])
    grades, rewards = ([chance.randrange(3) for _ in range(size)] for _ in range(2))
    opposite = any(grades[i] > grades[k] and rewards[i] < rewards[k] for i in range(size) for k in range(size))
    rows = [row(completions=tuple(map(str, range(size))), grades=tuple(grades), rewards=tuple(rewards))]
    audit_rows(audit := Audit(), rows)
    assert audit.rewards_against_grades == opposite


def test_answers_that_go_on_in_the_assistants_message_are_counted(tmp_path, byte_level):
    """A prompt that ends with the assistant's message is rarer than one that was cut in the wrong place."""
    user, begun = ({"role": role, "content": "Yes"} for role in ("user", "assistant"))
    template = read_chat_template(str(PLAIN))
    cases = [([user, begun], False, 1), ([user], False, 0), ([user, begun], True, 0), ([user, begun, user], False, 0)]
    for k, (prompt, asks, expected) in enumerate(cases):
        question = {side: [{"role": "user", "content": side + "?"}] * asks for side in ("chosen", "rejected")}
        sides = {side: [*asked, {"role": "assistant", "content": side}] for side, asked in question.items()}
        source = write(tmp_path / f"{k}.jsonl", {"prompt": prompt, **sides})
        audit = read_rows(source, eval_fraction=0.0, tokenizer=byte_level, chat_template=template).audit
        assert audit.continued == expected


def test_percentiles():
    assert percentiles(range(1, 102)) == {"p5": 6, "p50": 51, "p90": 91, "p99": 100, "max": 101}
    assert percentiles([]) == {}


def test_audit_is_json_and_a_table(tmp_path, byte_level):
    rows = [ranked("p", "a", "b"), ranked("q", "a", "a")]
    audit = read_rows(write(tmp_path / "r.jsonl", *rows), eval_fraction=0.0, tokenizer=byte_level).audit
    report = json.loads(json.dumps(audit.to_dict()))
    assert (report["read"], report["used"], report["refused"]) == (2, 1, {"all completions identical": 1})
    assert (report["list_sizes"], report["truncated_share"]) == ({"2": 1}, 0.0)
    console = Console(width=200, record=True)
    console.print(render(audit))
    text = console.export_text()
    assert "1 all completions identical" in text and "training / held-out lists" in text and "truncated" not in text
    used = "2 rows read, 1 list used (1 to train on, 0 held out)"
    assert in_one_line(audit) == f"data: {used}; 1 all completions identical"


@pytest.mark.parametrize("width", [60, 80])
def test_the_audit_cuts_no_path_however_narrow(tmp_path, byte_level, width):
    deep = tmp_path / ("a-long-folder-" * 8)
    deep.mkdir()
    file = write(deep / "rows.jsonl", ranked("p", "a", "b"))
    console = Console(width=width, record=True)
    console.print(render(read_rows(file, eval_fraction=0.0, tokenizer=byte_level).audit))
    lines = [line.split("│") for line in console.export_text().splitlines() if "│" in line]
    assert f"{deep}/rows.jsonl" in "".join(cells[1].strip() for cells in lines)


def test_rows_of_one_id_are_counted_and_used(tmp_path, byte_level):
    one, two = ([ranked(p, "a", "b") | {"id": "7"} for p in prompts] for prompts in ("pq", "r"))
    sources = [write(tmp_path / "one.jsonl", *one), write(tmp_path / "two.jsonl", *two)]
    audit = read_rows(*sources, eval_fraction=0.0, tokenizer=byte_level).audit
    assert (audit.duplicate_ids, audit.train_lists) == (1, 3), "another file may count from the same number"


# file: rows, and those that no pair can be made of (two of the file's dialogues differ before the last answer)
REAL = {
    "quickstart_politeness/pairs.jsonl": (1100, {}),
    "alpaca_eval2_listwise/lists.jsonl.gz": (644, {}),
    "oasst_ranked/lists.jsonl.gz": (158, {}),
    "ukp_convincing/pairs.jsonl.gz": (9553, {}),
    "hh_harmless/pairs.jsonl.gz": (1800, {"prompt mismatch between chosen and rejected": 2}),
    "chat_pairs_demo/pairs.jsonl.gz": (300, {}),
    "chat_pairs_demo/labelled.jsonl.gz": (300, {}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets_are_read(name, shared_data):
    source = read_source(str(shared_data / name))
    assert (source.read, source.refused) == REAL[name]
    assert source.read == len(source.rows) + sum(source.refused.values())


@pytest.mark.parametrize("name", REAL)
def test_real_sets_become_tokens(name, shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    template = read_chat_template(str(PLAIN))
    data = read_rows(
        str(shared_data / name),
        limit=40,
        tokenizer=tokenizer,
        chat_template=template,
        max_length=512,
        min_completions=1 if "labelled" in name else 2,
    )
    assert data.audit.used + sum(data.audit.refused.values()) == data.audit.read == 40
    rows = {row.number: row for row in read_source(str(shared_data / name), limit=40).rows}
    for entry in data.train:
        row = rows[entry["row"]]
        lengths = [len(entry["prompt_ids"]) + len(ids) for ids in entry["completion_ids"]]
        assert len(lengths) == len(row.completions) and max(lengths) <= 512
        for ids, length, completion in zip(entry["completion_ids"], lengths, row.completions, strict=True):
            text = completion if isinstance(completion, str) else " " + completion[0]["content"]
            whole = prompt_text(row, tokenizer, template) + text
            plain = isinstance(row.prompt, str)
            expected = [*tokenizer(whole, add_special_tokens=plain)["input_ids"], tokenizer.eos_token_id]
            assert entry["prompt_ids"] + ids == expected[:512]
            assert (ids[-1] == tokenizer.eos_token_id) == (length == len(expected))
    assert data.audit.missing_eos == data.audit.truncated_completions


def test_a_ranking_without_a_prompt_says_so(shared_data):
    file = shared_data / "ukp_convincing" / "rankings.jsonl.gz"
    with pytest.raises(UserError) as refusal:
        read_source(str(file), ignore=["question"])
    assert str(refusal.value) == (
        f"{file}, row 1, field prompt: missing (other columns: topic, stance); "
        "give a `prompt` or `messages` column (and 25 more malformed rows)"
    )


def test_what_is_counted_once_is_said_of_one(tmp_path, byte_level):
    rows = [ranked("p", "a", ""), ranked("q", "c", "c"), ranked("r", "a", "b", weight=2)]
    source = write(tmp_path / "rows.jsonl", *rows)
    said = in_one_line(read_rows(source, eval_fraction=0.0, tokenizer=byte_level).audit)
    assert "; 1 all completions identical; " in said, "a reason is a sentence and not a name"
    assert "; 1 empty completion" in said and "; 1 row with a weight of its own" in said
