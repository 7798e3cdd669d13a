"""Every format through its reader: the first row of its fixture, typed out."""

import json
from pathlib import Path

import pytest

from align.data.formats import FORMATS, find_reader, read_prompt, read_row
from align.data.schema import BadRow, UnusableRow
from align.data.sources import read_source

FOLDER = Path(__file__).parents[2] / "data" / "formats"
PROMPT = "Name a fruit that is yellow."
DIALOGUE = f"\n\nHuman: {PROMPT}\n\nAssistant:"
USER = [{"role": "user", "content": "Name a fruit that is yellow."}]
THREE = ("A banana.", "Lemons, which are sour.", "A cherry.")
THREE_CHAT = tuple([{"role": "assistant", "content": text}] for text in THREE)
PAIR = ("A banana.", "A cherry.")
PAIR_CHAT = (THREE_CHAT[0], THREE_CHAT[2])

# file: prompt, completions, grades, rewards, meta
EXPECTED = {
    "canonical": (PROMPT, THREE, (3.0, 2.0, 0.0), None, {"topic": "small talk"}),
    "canonical_chat": (USER, THREE_CHAT, (3.0, 2.0, 0.0), None, {}),
    "completions_ranks": (PROMPT, THREE, None, (-1.0, -2.0, -3.0), {}),
    "responses_rewards": (PROMPT, THREE, None, (1.5, 1.0, 0.0), {}),
    "messages_answers_ratings": (USER, THREE_CHAT, None, (3.0, 2.0, 0.0), {}),
    "generated_scores": (
        PROMPT,
        THREE,
        None,
        (0.375, 0.25, 0.0),
        {"prompt_id": "0f", "chosen": USER + THREE_CHAT[0], "rejected": USER + THREE_CHAT[2]},
    ),
    "items_scores": (PROMPT, THREE, None, (3.0, 2.0, 0.0), {}),
    "items_ranks_chat": (USER, THREE_CHAT, None, (0.0, -1.0, -2.0), {}),
    "items_grades": (PROMPT, THREE, (3.0, 2.0, 0.0), None, {}),
    "completion_objects": (PROMPT, THREE, None, (3.0, 2.0, 0.0), {"completions[].model": ["m", "m", "m"]}),
    "answer_objects": (DIALOGUE + " ", THREE, None, (-1.0, -2.0, -3.0), {"answers[].model": ["m", "m", "m"]}),
    "context_completions": (USER, THREE_CHAT, None, (0.0, -1.0, -2.0), {"task_name": "talk"}),
    "preference": (PROMPT, PAIR, (1.0, 0.0), None, {"margin": 3}),
    "preference_sets": (PROMPT, THREE, (1.0, 1.0, 0.0), None, {}),
    "preference_chat": (USER, PAIR_CHAT, (1.0, 0.0), None, {}),
    "preference_whole_chat": (USER, PAIR_CHAT, (1.0, 0.0), None, {}),
    "preference_implicit": (f"Q: {PROMPT}\nA: A", (" banana.", " cherry."), (1.0, 0.0), None, {}),
    "preference_implicit_chat": (USER, PAIR_CHAT, (1.0, 0.0), None, {}),
    "preference_messages": (USER, PAIR_CHAT, (1.0, 0.0), None, {}),
    "dialogue_text": (DIALOGUE, (" A banana.", " A cherry."), (1.0, 0.0), None, {}),
    "unpaired": (PROMPT, PAIR[:1], (1.0,), None, {}),
    "unpaired_chat": (USER, PAIR_CHAT[:1], (1.0,), None, {}),
    "labelled_messages": (USER, PAIR_CHAT[:1], (1.0,), None, {}),
    "sft": (PROMPT, PAIR[:1], None, None, {}),
    "sft_messages": (USER, PAIR_CHAT[:1], None, None, {}),
    "sampled": (PROMPT, THREE, None, (3.0, 2.0, 0.0), {"policy_version": 40}),
    "token_ids": (list(PROMPT.encode()), tuple(list(t.encode()) for t in THREE), (3.0, 2.0, 0.0), None, {}),
    "token_ids_pair": (list(PROMPT.encode()), tuple(list(t.encode()) for t in PAIR), (1.0, 0.0), None, {}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_first_row_of_the_fixture(name):
    source = read_source(str(FOLDER / f"{name}.jsonl"))
    row = source.rows[0]
    assert (row.prompt, row.completions, row.grades, row.rewards, row.meta) == EXPECTED[name]
    assert (source.read, len(source.rows), source.refused) == (4, 4, {})
    assert (row.source, row.number, row.id) == (str(FOLDER / f"{name}.jsonl"), 1, f"{FOLDER / name}.jsonl:1")


def test_every_fixture_is_tested_and_every_format_has_one():
    assert {file.stem for file in FOLDER.glob("*.jsonl")} == set(EXPECTED)
    index = (FOLDER / "README.md").read_text()
    assert all(f"`{name}.jsonl`" in index for name in EXPECTED)
    readers = {find_reader(_first(file)) for file in FOLDER.glob("*.jsonl")}
    assert readers == {reader for _, reader in FORMATS.values()}


def _first(file: Path) -> dict:
    return json.loads(file.read_text().splitlines()[0])


def read(**columns):
    return read_row(columns, "rows.jsonl", 7)


def test_labels_false_and_numeric():
    assert read(prompt="p", completion="c", label=False).grades == (0.0,)
    assert read(prompt="p", completion="c", label=1).grades == (1.0,)


def test_zero_based_ranks_order_like_one_based_ones():
    zero = read(prompt="p", completions=["a", "b"], ranks=[1, 0]).rewards
    one = read(prompt="p", completions=["a", "b"], ranks=[2, 1]).rewards
    assert zero[0] - zero[1] == one[0] - one[1] == -1


def test_own_grades_and_rewards_are_both_kept():
    row = read(id=3, prompt="p", completions=["a", "b"], grades=[1, 0], rewards=[5, 4], meta={"x": 1}, topic="t")
    assert (row.id, row.grades, row.rewards, row.meta) == ("3", (1.0, 0.0), (5.0, 4.0), {"x": 1, "topic": "t"})


def test_null_columns_count_as_absent():
    row = read(
        prompt=None, messages=None, instruction="p", responses=None, chosen="a", rejected="b", images=None, tools=[]
    )
    assert (row.prompt, row.completions) == ("p", ("a", "b"))


def test_null_message_keys_are_left_out():
    message = {"role": "user", "content": "hi", "tool_calls": None}
    assert read(prompt=[message], chosen="a", rejected="b").prompt == [{"role": "user", "content": "hi"}]


def test_text_prompt_with_message_completions_becomes_the_users_turn():
    row = read(prompt="p", chosen=[{"role": "assistant", "content": "a"}], rejected="b")
    assert row.prompt == [{"role": "user", "content": "p"}]
    assert row.completions == ([{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}])


def test_implicit_prompt_of_a_conversation_ends_before_the_last_message():
    turns = [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c")]]
    best, worst = {"role": "assistant", "content": "x"}, {"role": "assistant", "content": "x y"}
    row = read(chosen=[*turns, best], rejected=[*turns, worst])
    assert (row.prompt, row.completions) == (turns, ([best], [worst]))


def test_implicit_text_prompt_leaks_nothing_where_one_side_begins_with_the_other():
    row = read(chosen="Say: yes", rejected="Say: yes of course")
    assert (row.prompt, row.completions) == ("Say:", (" yes", " yes of course"))
    row = read(chosen="Say: yes of course", rejected="Say: yes")
    assert (row.prompt, row.completions) == ("Say:", (" yes of course", " yes"))


def test_implicit_text_prompt_never_cuts_a_word_or_special_token():
    row = read(chosen="Q <|end|>cat", rejected="Q <|end|>car")
    assert (row.prompt, row.completions) == ("Q", (" <|end|>cat", " <|end|>car"))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: other\n\nAssistant: b"),
        ("\n\nHuman: a\n\nAssistant: b", "no dialogue"),
        ("cat", "dog"),
        (" cat", " dog"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            [{"role": "user", "content": "other"}, {"role": "assistant", "content": "b"}],
        ),
    ],
)
def test_prompts_that_differ_are_counted_not_guessed(chosen, rejected):
    with pytest.raises(UnusableRow, match="prompt mismatch between chosen and rejected"):
        read(chosen=chosen, rejected=rejected)


def test_dialogue_is_cut_at_its_last_assistant_mark():
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = read(chosen=dialogue + " x", rejected=dialogue + " y")
    assert (row.prompt, row.completions) == (dialogue, (" x", " y"))


def test_sampled_rows_keep_the_token_ids_beside_the_texts():
    row = read_source(str(FOLDER / "sampled.jsonl")).rows[0]
    assert row.prompt_ids == list(PROMPT.encode())
    assert row.completion_ids == tuple([*text.encode(), 0] for text in THREE)
    assert row.meta == {"policy_version": 40} and row.unread == ()


@pytest.mark.parametrize(
    ("ids", "field"),
    [
        ({"prompt_ids": "p", "completion_ids": [[1], [2]]}, "prompt_ids"),
        ({"prompt_ids": [1], "completion_ids": [[1], []]}, "completion_ids"),
        ({"prompt_ids": [1], "completion_ids": [[1]]}, "completion_ids"),
        ({"prompt_ids": [1], "completion_ids": [[1], [-2]]}, "completion_ids[1]"),
    ],
)
def test_sampled_ids_are_checked(ids, field):
    with pytest.raises(BadRow) as error:
        read(prompt="p", completions=["a", "b"], rewards=[1, 0], **ids)
    assert error.value.field == field


@pytest.mark.parametrize("name", EXPECTED)
def test_prompt_of_any_format(name):
    row = read_prompt(_first(FOLDER / f"{name}.jsonl"), "rows.jsonl", 1)
    assert (row.prompt, row.completions, row.rewards, row.completion_ids) == (EXPECTED[name][0], (), None, None)


def test_a_prompt_needs_nothing_beside_it():
    assert read_prompt({"prompt": "p", "answer": "42"}, "rows.jsonl", 1).meta == {"answer": "42"}
    assert read_prompt({"prompt": USER}, "rows.jsonl", 1).prompt == USER
    assert read_prompt({"messages": USER}, "rows.jsonl", 1).prompt == USER
    assert read_prompt({"prompt_ids": [3, 4]}, "rows.jsonl", 1).prompt == [3, 4]
    with pytest.raises(BadRow, match="prompt"):
        read_prompt({"quest": "p"}, "rows.jsonl", 1)
