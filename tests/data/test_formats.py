"""Every format through its reader: a row of it and what is read of it, typed out; and what holds for any format."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from align.data.formats import FORMAT, Format, find_format, read_prompt, read_row
from align.data.formats.base import in_order
from align.data.parts import parts_of
from align.data.schema import BadRow, UnusableRow
from align.data.sources import read_source

FOLDER = Path(__file__).parents[2] / "data" / "formats"
PROMPT = "Name a fruit that is yellow."
DIALOGUE = f"\n\nHuman: {PROMPT}\n\nAssistant:"
USER = [{"role": "user", "content": "Name a fruit that is yellow."}]
BRIEF = [{"role": "system", "content": "Be brief."}, *USER]
SIDES = ("chosen", "rejected")
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
    "openai_preference": (USER, PAIR_CHAT, (1.0, 0.0), None, {"input[].parallel_tool_calls": True}),
    "gemini_preference": (BRIEF, PAIR_CHAT[::-1], (0.0, 1.0), None, {}),
    "nova_preference": (BRIEF, PAIR_CHAT, (1.0, 0.0), None, {"schemaVersion": "bedrock-conversation-2024"}),
    "sharegpt": (USER, PAIR_CHAT, (1.0, 0.0), None, {}),
    "swift_pair": (USER, PAIR_CHAT, (1.0, 0.0), None, {}),
    "alpaca": (
        [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello, what is it?"},
            {"role": "user", "content": f"Answer in a sentence.\n{PROMPT}"},
        ],
        PAIR_CHAT,
        (1.0, 0.0),
        None,
        {},
    ),
    "orca_pair": (f"Be brief.\n\n{PROMPT}", PAIR, (1.0, 0.0), None, {}),
    "distilabel": (
        PROMPT,
        THREE,
        None,
        (3.0, 2.0, 0.0),
        {
            "rationales": ["so", "so", "so"],
            "raw_generation_responses": [f" {text}\n" for text in THREE],
            "chosen": USER + THREE_CHAT[0],
            "rejected": USER + THREE_CHAT[2],
        },
    ),
    "distilabel_pair": (
        USER,
        PAIR_CHAT,
        (1.0, 0.0),
        (3.0, 0.0),
        {
            "conversation": [{"input": PROMPT, "output": THREE[1]}],
            "original_response": THREE[1],
            "generation_prompt": [f"You are a helpful assistant. {PROMPT}"],
            "raw_generation_responses": [THREE[2], "Something else."],
        },
    ),
    "whole_completion": (USER, PAIR_CHAT[:1], (1.0,), None, {}),
    "argilla_record": (PROMPT, THREE, None, (3.5, 2.5, 0.5), {"status": "completed"}),
    "chosen_response": (PROMPT, PAIR, (1.0, 0.0), (3.0, 0.0), {}),
    "prometheus": (
        PROMPT,
        PAIR[::-1],
        (0.0, 1.0),
        None,
        {"orig_criteria": "Is it true?", "instruction": f"###Task: which is better? {PROMPT}"},
    ),
    "step_pair": (
        [*USER, {"role": "assistant", "content": "Step 1: I think of it.\nStep 2: "}],
        PAIR_CHAT,
        (1.0, 0.0),
        None,
        {
            f"full_{side}": f"Step 1: I think of it.\nStep 2: {text} The end."
            for side, text in zip(SIDES, PAIR, strict=True)
        },
    ),
    "token_ids": (list(PROMPT.encode()), tuple(list(t.encode()) for t in THREE), (3.0, 2.0, 0.0), None, {}),
    "token_ids_pair": (list(PROMPT.encode()), tuple(list(t.encode()) for t in PAIR), (1.0, 0.0), None, {}),
}

# a row without a fixture, in front of what is expected of it as above
TYPED = {
    "token_ids_one": (
        {"prompt_ids": [1, 2], "completion_ids": [3], "label": False},
        ([1, 2], ([3],), (0.0,), None, {}),
    ),
    "response_ratings": (
        {"question": "q", "response": "r", "scores": {"helpfulness": 3}},
        ("q", ("r",), None, None, {"attributes": [{"helpfulness": 3}]}),
    ),
}


def rated(helpfulness: int) -> dict[str, int]:
    return {"helpfulness": helpfulness, "correctness": 2, "coherence": 2, "complexity": 2, "verbosity": 2}


# votes, ratings and rankings as they were published
EXPECTED |= {
    "helpsteer": (USER, THREE_CHAT, None, (3.0, 2.0, 0.0), {"attributes": [rated(3), rated(2), rated(0)]}),
    "helpsteer2_preference": (
        USER,
        PAIR_CHAT,
        (1.0, 0.0),
        None,
        {"split": "train", "strength": 2.0, "preference_statement": "The first is better than the second."},
    ),
    "helpsteer3": (
        USER,
        PAIR_CHAT[::-1],
        (0.0, 1.0),
        None,
        {
            "domain": "general",
            "language": "english",
            "strength": 3.0,
            "individual_preference": [
                {"score": 3, "reasoning": "It is right.", "feedback1": "Wrong.", "feedback2": "Right."}
            ],
        },
    ),
    "arena": (
        USER,
        PAIR_CHAT[::-1],
        (0.0, 1.0),
        None,
        {"question_id": "0f", "model_a": "m", "model_b": "n", "turn": 1, "language": "English"},
    ),
    "arena_table": (USER, PAIR_CHAT, (1.0, 0.0), None, {"model_a": "m", "model_b": "n"}),
    "safe_rlhf": (
        PROMPT,
        PAIR[::-1],
        (0.0, 1.0),
        None,
        {"is_response_0_safe": True, "is_response_1_safe": True, "safer_response_id": 0},
    ),
    "numbered_pair": (PROMPT, PAIR[::-1], (0.0, 1.0), None, {"raw_preference": 4}),
    "shp": (PROMPT, PAIR, (1.0, 0.0), (30.0, 1.0), {"post_id": "0f", "score_ratio": 30.0}),
    "webgpt": (
        PROMPT,
        PAIR,
        None,
        (0.5, -0.5),
        {"quotes_0": {"title": ["Fruit"], "extract": ["Bananas are yellow."]}},
    ),
    "summary_comparison": (
        f"SUBREDDIT: r/AskReddit\n\nTITLE: {PROMPT}\n\nPOST: I would like to know. {PROMPT}\n\nTL;DR:",
        (" A cherry.", " A banana."),
        (0.0, 1.0),
        None,
        {"summaries[].policy": ["sup", "ref"], "summaries[].note": ["", ""], "worker": "w"},
    ),
    "summary_axes": (
        f"Article:\n\nSomebody asked this. {PROMPT}\n\nTL;DR:",
        (" A banana.",),
        None,
        (6.0,),
        {"attributes": [{"overall": 6, "accuracy": 7}], "worker": "w"},
    ),
    "stack_exchange": (
        PROMPT,
        THREE,
        None,
        (3.0, 2.0, 0.0),
        {
            "qid": 5,
            "answers[].answer_id": [6, 6, 6],
            "answers[].selected": [True, False, False],
            "date": "2020/01/01",
            "metadata": ["https://example.com/q/5"],
        },
    ),
    "ultrafeedback": (
        PROMPT,
        THREE,
        None,
        (3.0, 2.0, 0.0),
        {
            "source": "s",
            "models": ["m", "m", "m"],
            "attributes": [{"helpfulness": 3.0}, {"helpfulness": 2.0}, {"helpfulness": 0.0}],
            "completions[].model": ["m", "m", "m"],
            "completions[].custom_system_prompt": ["Be helpful."] * 3,
            "completions[].annotations": [
                {"helpfulness": {"Rating": str(rating), "Rationale": "So."}, "honesty": {"Rating": "N/A"}}
                for rating in (3, 2, 0)
            ],
        },
    ),
    "oasst_tree": (
        USER,
        THREE_CHAT,
        None,
        (0.0, -1.0, -2.0),
        {"message_tree_id": PROMPT, "tree_state": "ready_for_export"},
    ),
    "oasst_messages": (USER, THREE_CHAT, None, (0.0, -1.0, -2.0), {"message_tree_id": PROMPT}),
}
OWN_IDS = {"oasst_tree": PROMPT, "oasst_messages": PROMPT}

# fixture -> its format, where that has another name
DETECTED = {
    **dict.fromkeys(("canonical", "canonical_chat", "completions_ranks", "responses_rewards"), "lists"),
    **dict.fromkeys(("messages_answers_ratings", "generated_scores"), "lists"),
    **dict.fromkeys(("items_scores", "items_ranks_chat", "items_grades"), "items"),
    **dict.fromkeys(("completion_objects", "answer_objects", "context_completions"), "items"),
    **dict.fromkeys(("preference_chat", "preference_whole_chat", "preference_messages", "orca_pair"), "preference"),
    **dict.fromkeys(("preference_implicit", "preference_implicit_chat"), "implicit_preference"),
    **dict.fromkeys(("unpaired", "unpaired_chat", "sft", "response_ratings"), "completion"),
    **dict.fromkeys(("labelled_messages", "sft_messages"), "conversation"),
    **dict.fromkeys(("token_ids_one", "token_ids_pair"), "token_ids"),
}


@pytest.mark.parametrize("name", [*EXPECTED, *TYPED])
def test_a_row_is_of_its_own_format(name):
    assert find_format(rows()[name]).name == DETECTED.get(name, name)


@pytest.mark.parametrize("name", TYPED)
def test_a_row_as_it_is_typed_here(name):
    raw, expected = TYPED[name]
    row = read(**deepcopy(raw))
    assert (row.prompt, row.completions, row.grades, row.rewards, row.meta) == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_first_row_of_the_fixture(name):
    source = read_source(str(FOLDER / f"{name}.jsonl"))
    row = source.rows[0]
    assert (row.prompt, row.completions, row.grades, row.rewards, row.meta) == EXPECTED[name]
    assert (source.read, len(source.rows), source.refused) == (4, 4, {})
    identity = OWN_IDS.get(name, f"{FOLDER / name}.jsonl:1")
    assert (row.source, row.number, row.id) == (str(FOLDER / f"{name}.jsonl"), 1, identity)


def test_every_fixture_is_tested_and_every_format_has_a_row():
    assert {file.stem for file in FOLDER.glob("*.jsonl")} == set(EXPECTED)
    index = (FOLDER / "README.md").read_text()
    assert all(f"`{name}.jsonl`" in index for name in EXPECTED)
    assert {find_format(row) for row in rows().values()} == set(FORMAT.classes.values())


@pytest.mark.parametrize("own", FORMAT.classes.values(), ids=list(FORMAT.classes))
def test_a_format_says_what_it_is(own):
    assert own.__doc__ and own.shape and own.read is not Format.read
    assert not own.detect({}), "it takes every row: name the columns that it needs"


@pytest.mark.parametrize("name", [*EXPECTED, *TYPED])
def test_a_row_of_two_formats_is_read_by_the_one_that_says_it_comes_before(name):
    row = rows()[name]
    first, *others = [own.name for own in FORMAT.classes.values() if own.detect(row)]
    missing = [other for other in others if not is_before(first, other)]
    assert not missing, f"`{first}` and {missing} both detect this row: one must name the other in `before`"


def is_before(first: str, other: str) -> bool:
    later = FORMAT.classes[first].before
    return other in later or any(is_before(name, other) for name in later)


WRONG = (None, True, 5, "", "a word", {}, {"a": 1}, [], [None], [5], ["x"], [[]], [{}], [{"role": "user"}])


@pytest.mark.parametrize("name", [*EXPECTED, *TYPED])
def test_whatever_a_column_holds_a_row_is_read_or_refused_in_words(name):
    row = rows()[name]
    broken = [{other: value for other, value in row.items() if other != column} for column in row]
    broken += [{**row, column: wrong} for column in row for wrong in WRONG]
    for raw in broken:
        for reader in (read_row, read_prompt):
            try:
                reader(deepcopy(raw), "rows.jsonl", 1)
            except (BadRow, UnusableRow) as error:
                assert str(error)


def new_format(name: str, **own) -> type[Format]:
    return type("New", (Format,), {"name": name, "shape": "{new}", **own})


def test_a_format_is_asked_before_those_it_names_wherever_its_module_stands():
    for name in ("a_new_one", "zz_new_one"):
        order = [*in_order({**FORMAT.classes, name: new_format(name, before=("completion",))})]
        assert order.index(name) < order.index("completion")
        assert [own for own in order if own != name] == [*FORMAT.classes]


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        ([new_format("new", before=("complection",))], "`complection`, which is no format"),
        ([new_format("a", before=("b",)), new_format("b", before=("a",))], "cycle"),
    ],
)
def test_an_order_that_cannot_be_is_refused(formats, said):
    with pytest.raises(ValueError, match=said):
        in_order({**FORMAT.classes, **{own.name: own for own in formats}})


def test_two_formats_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two classes are the format `lists`"):
        FORMAT.add(new_format("lists"))


@pytest.fixture
def duel(monkeypatch):
    """A format that a module might bring: two answers beside the winner's number, which a general one would misread."""

    class Duel(Format):
        """Two answers and the number of the better one."""

        name, shape, published = "duel", "{ask, completions, winner}", "Somebody"
        needs, keeps, before = ("ask", "winner"), ("response",), ("lists",)

        @staticmethod
        def read(columns):
            best, answers = columns.pop("winner"), columns.pop("completions")
            grades = [float(k == best) for k in range(len(answers))]
            return parts_of(columns.pop("ask"), answers, "completions[{}]", grades=grades, prompt_called="ask[{}]")

    monkeypatch.setattr(FORMAT, "classes", in_order({**FORMAT.classes, "duel": Duel}))


def test_a_new_format_is_read_before_the_general_one_with_what_it_keeps(duel):
    row = read(ask="p", completions=["a", "b"], winner=1, response="what else it has", topic="t")
    assert (row.prompt, row.completions, row.grades, row.unread) == ("p", ("a", "b"), (0.0, 1.0), ("topic",))
    assert row.meta == {"response": "what else it has", "topic": "t"}
    assert read_prompt({"ask": "p", "completions": ["a", "b"], "winner": 1}, "rows.jsonl", 7).prompt == "p"


def test_a_new_formats_prompt_is_called_as_the_file_calls_it(duel):
    with pytest.raises(BadRow) as error:
        read(ask=[{"role": "user"}], completions=["a", "b"], winner=1)
    assert error.value.field == "ask[0]"


def test_an_unknown_row_is_told_the_general_formats(duel):
    with pytest.raises(BadRow) as error:
        read(quest="p", a=1)
    assert "{prompt, chosen, rejected}" in error.value.remedy and "{ask, completions, winner}" not in error.value.remedy


def rows() -> dict[str, dict]:
    """A row of each fixture and each of TYPED."""
    typed = {name: deepcopy(raw) for name, (raw, _) in TYPED.items()}
    return {name: _first(FOLDER / f"{name}.jsonl") for name in EXPECTED} | typed


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
    row = read_source(str(FOLDER / f"{name}.jsonl"), read_one=read_prompt).rows[0]
    assert (row.prompt, row.completions, row.rewards, row.completion_ids) == (EXPECTED[name][0], (), None, None)


def test_a_prompt_needs_nothing_beside_it():
    assert read_prompt({"prompt": "p", "answer": "42"}, "rows.jsonl", 1).meta == {"answer": "42"}
    assert read_prompt({"prompt": USER}, "rows.jsonl", 1).prompt == USER
    assert read_prompt({"messages": USER}, "rows.jsonl", 1).prompt == USER
    assert read_prompt({"prompt_ids": [3, 4]}, "rows.jsonl", 1).prompt == [3, 4]
    with pytest.raises(BadRow, match="prompt"):
        read_prompt({"quest": "p"}, "rows.jsonl", 1)
