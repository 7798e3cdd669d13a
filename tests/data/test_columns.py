"""No column is lost in silence: each is read, ignored by request, counted in the audit, or refused by its name."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from read_rows import read_rows
from transformers import AutoTokenizer

from align.data.audit import in_one_line
from align.data.columns import how_to_ignore
from align.data.formats import read_prompt, read_row
from align.data.schema import BadRow, UnusableRow
from align.errors import UserError
from rewards.dropped import IGNORE

STORY = Path(__file__).parents[2] / "data" / "story-policy"
USER = [{"role": "user", "content": "Say hi"}]
PAIR = {"prompt": "Say hi to me", "chosen": "Salut", "rejected": "Go away"}
LISTED = {"prompt": "Say hi to me", "completions": ["Salut", "Go away"], "grades": [1, 0]}
IMPLICIT = {"chosen": "Say hi. Salut", "rejected": "Say hi. Go away"}
ITEM = {"text": "b", "score": 0}
LONE = {"messages": [*USER, {"role": "assistant", "content": "Salut"}]}


def read(*rows, **columns):
    row = {name: value for part in rows for name, value in part.items()} | columns
    return read_row(row, "rows.jsonl", 7)


@pytest.mark.parametrize("name", ["question", "query", "input", "context", "instruction", "messages", "prompt"])
def test_the_prompt_under_any_of_its_names(name):
    row = read({name: "Where is Paris?"}, chosen="In France", rejected="In Spain")
    assert (row.prompt, row.completions, row.unread) == ("Where is Paris?", ("In France", "In Spain"), ())


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_text_is_the_prompts_beginning(name):
    text = {name: "Answer in French."}
    assert read(PAIR, text).prompt == "Answer in French.\n\nSay hi to me"
    assert read(IMPLICIT, text).prompt == "Answer in French.\n\nSay hi."
    message = {"role": "system", "content": "Answer in French."}
    chat = [message, {"role": "user", "content": "Say hi to me"}]
    assert read(PAIR, text, chosen=[{"role": "assistant", "content": "Salut"}]).prompt == chat
    assert read(LONE, text, label=True).prompt == [message, *USER]
    assert read(PAIR, text, prompt=chat).prompt == chat
    assert read(PAIR, text, prompt="Answer in French. Say hi").prompt == "Answer in French. Say hi"
    assert read(PAIR, {name: ""}) == read(PAIR)


@pytest.mark.parametrize("name", ["label", "kto_tag", "is_desirable", "desirable"])
@pytest.mark.parametrize("value", [False, True, 0, 1])
def test_a_label_under_any_of_its_names(name, value):
    assert read(LONE, {name: value}).grades == (float(value),)


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")])
def test_scores_of_the_sides_are_rewards_beside_their_order(names):
    for pair in (PAIR, IMPLICIT):
        row = read(pair, dict(zip(names, (3, 4.5), strict=True)))
        assert (row.grades, row.rewards, row.unread) == ((1.0, 0.0), (3.0, 4.5), ())


# row: the columns that are named, in order, where it is refused
REFUSED = [
    ({**PAIR, "question": "Where is Paris?"}, "question"),
    ({**PAIR, "context": "Paris is in France."}, "context"),
    ({"context": "Paris is in France.", "question": "In what land?", "chosen": "a", "rejected": "b"}, "question"),
    ({**PAIR, "history": "Hello there"}, "history"),
    ({**PAIR, "history": "[Hello]"}, "history"),
    ({**PAIR, "contents": "Hello there"}, "contents"),
    ({**PAIR, "enable_thinking": False}, "enable_thinking"),
    ({**PAIR, "thinking": True}, "thinking"),
    ({**PAIR, "reasoning_effort": "low"}, "reasoning_effort"),
    ({**PAIR, "template_kwargs": {"a": 1}}, "template_kwargs"),
    ({**PAIR, "reasoning_content": "They want a greeting."}, "reasoning_content"),
    ({**PAIR, "screenshot": "a.png"}, "screenshot"),
    ({**PAIR, "reject": "Never"}, "reject"),
    ({**PAIR, "conversations": [{"from": "human", "value": "Hello there"}]}, "conversations"),
    ({**PAIR, "earlier": [{"role": "user", "content": "Hello there"}]}, "earlier"),
    ({**PAIR, "notes": "<|im_start|>user\nHello<|im_end|>"}, "notes"),
    ({**PAIR, "customSystemPrompt": "Be terse."}, "customSystemPrompt"),
    ({**PAIR, "persona": "A pirate."}, "persona"),
    ({**PAIR, "system": "Be kind.", "system_prompt": "Be terse."}, "system_prompt"),
    ({**PAIR, "sys": "Be kind."}, "sys"),
    ({**PAIR, "documents": ["Paris is in France."]}, "documents"),
    ({**PAIR, "question": "法国的首都是哪里？"}, "question"),
    ({"prompt": "Translate", "input": "Hello", "chosen": "Salut", "rejected": "Adieu"}, "input"),
    ({"anfrage": "法国的首都是哪里？", "chosen": "它是 巴黎", "rejected": "它是 伦敦"}, "anfrage"),
    ({**PAIR, "system": [{"type": "text", "text": "Be kind."}]}, "system"),
    ({**PAIR, "rejected_2": "Never"}, "rejected_2"),
    ({**PAIR, "model_output": "Never"}, "model_output"),
    ({**PAIR, "response_a": "Never", "response_b": "Ever"}, "response_a, response_b"),
    ({**PAIR, "template": "alpaca"}, "template"),
    ({**PAIR, "rejected_tools": "[{}]"}, "rejected_tools"),
    ({**PAIR, "sample_weight": 2}, "sample_weight"),
    ({**PAIR, "kto_tag": False}, "kto_tag"),
    ({**PAIR, "winner": "rejected"}, "winner"),
    ({**PAIR, "preference": " Tie "}, "preference"),
    ({**PAIR, "label": 0}, "label"),
    ({**PAIR, "label": -1}, "label"),
    ({**PAIR, "safer": 1}, "safer"),
    ({**LISTED, "winner": 2}, "winner"),
    ({**LISTED, "is_chosen": True}, "is_chosen"),
    ({**LISTED, "responses": ["Hm", "Ha"]}, "responses"),
    ({**PAIR, "rejected_response": "Never"}, "rejected_response"),
    ({**PAIR, "rejected_messages": [{"role": "assistant", "content": "Never"}]}, "rejected_messages"),
    ({**LONE, "thumbs_up": False}, "thumbs_up"),
    ({**LONE, "preference": 0}, "preference"),
    ({**LONE, "label": True, "kto_tag": True}, "kto_tag"),
    ({**IMPLICIT, "ask": "Say hi to me in French"}, "ask"),
    ({"ask": "Say hi to me", "chosen": "Salut", "rejected": "Go away"}, "ask"),
    ({"prompt": "p", "items": [{"text": "a", "score": 1, "system": "Be kind."}, ITEM]}, "items[].system"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "names"), REFUSED, ids=[names for _, names in REFUSED])
def test_what_looks_like_a_part_of_the_preference_is_refused_with_the_remedy(row, names):
    with pytest.raises(BadRow) as error:
        read(row)
    first, *others = names.split(", ")
    assert error.value.field == first and "would stay unread" in error.value.problem
    assert all(name in error.value.problem for name in others)
    assert how_to_ignore(first, *others) in error.value.remedy
    try:
        ignored = read_row(row, "rows.jsonl", 7, ignore=[first, *others])
    except UnusableRow as reason:
        assert str(reason) == "prompt mismatch between chosen and rejected"
    else:
        assert not {first, *others} & {*ignored.unread}


# columns of public sets that say something about the row and are no part of it
FACTS = {
    "prompt_id": "0f", "source": "the web", "chosen_model": "gpt 4", "num_responses": 7, "turns": 1,
    "label": 2, "winner": "model_a", "topic": "small talk", "reference_answer": "Say hello", "category": "chit chat",
    "messages": [{"role": "user", "content": "Say hi to me"}, {"role": "assistant", "content": "Salut"}],
    "labelling_prompt": [{"role": "user", "content": "Which is better?"}],
    "original_chosen": "Go away", "question": "hi", "input": "", "history": [], "images": [],
    "num_thinking_tokens": 5, "judge_reasoning": "It is kind.", "reasoning": "", "contents": [], "enable": "",
    "raw_labelling_response": "Rating: 5", "instruction_id_list": ["length:words"], "language": "French text",
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_facts_and_copies_may_stay_unread_and_are_named(name):
    row = read(PAIR, {name: FACTS[name]})
    assert row.unread == (name,) and row.meta == {name: FACTS[name]}


def test_keys_of_a_lists_objects_are_named_too():
    items = [{"text": "a", "score": 1, "model": "m"}, {"text": "b", "score": 0, "critique": "too short, too curt"}]
    row = read(prompt="Say hi", items=items)
    assert row.unread == ("items[].model", "items[].critique")
    assert row.meta["items[].critique"] == [None, "too short, too curt"]
    assert read_row({"prompt": "p", "items": items}, "f", 1, ignore=["items[].model"]).unread == ("items[].critique",)


def test_a_score_that_some_items_lack_is_not_passed_over():
    with pytest.raises(BadRow, match="missing") as error:
        read(prompt="p", items=[{"text": "a"}, {"text": "b", "score": 1}])
    assert error.value.field == "items[0].score"


def test_for_sampling_only_the_prompt_counts():
    assert read_prompt({**PAIR, "rejected_2": "Never", "kto_tag": True}, "f", 1).prompt == "Say hi to me"
    with pytest.raises(BadRow, match="looks like the prompt"):
        read_prompt({**PAIR, "context": "Paris is in France."}, "f", 1)
    assert read_prompt({"system": "Be kind.", "question": "Say hi"}, "f", 1).prompt == "Be kind.\n\nSay hi"


def test_answers_that_repeat_a_long_prompt_lose_it():
    dialogue = "\n\nHuman: Hi\n\nAssistant:"
    row = read(prompt=dialogue, chosen=dialogue + " good", rejected=dialogue + " bad")
    assert (row.prompt, row.completions, row.repeated) == (dialogue, (" good", " bad"), "cut")
    row = read(prompt="Q: 1+1? A:", completions=["Q: 1+1? A: 2", "Q: 1+1? A: 3"], ranks=[1, 2])
    assert (row.completions, row.repeated) == ((" 2", " 3"), "cut")
    one_side = read(prompt=dialogue, chosen=dialogue + " good", rejected="bad")
    assert (one_side.completions, one_side.repeated) == ((dialogue + " good", "bad"), None)


def test_answers_that_begin_like_a_short_prompt_or_quote_a_message_are_left():
    row = read(prompt="Hello", chosen="Hello to you", rejected="Hello")
    assert (row.completions, row.repeated) == (("Hello to you", "Hello"), "kept")
    said = [{"role": "assistant", "content": "Say hi? Salut"}]
    row = read(prompt=USER, chosen=said, rejected=[{"role": "assistant", "content": "Say hi? No"}])
    assert (row.completions[0], row.repeated) == (said, "kept")


LONG = "Please tell me in a few words where the city of Paris lies."


@pytest.mark.parametrize(
    ("prompt", "repeated", "rest"),
    [
        (LONG + " ", LONG + "\n", ""),
        (LONG, "\n" + LONG + " ", " "),
        (LONG.replace(" ", "  "), LONG + "\n", "\n"),
        ("Human: Hi\r\nAssistant:", "Human: Hi\nAssistant: ", " "),
        ("Q: 1 + 1?\n", "Q: 1 + 1?", None),
    ],
)
def test_a_prompt_is_repeated_whatever_its_white_space(prompt, repeated, rest):
    row = read(prompt=prompt, completions=[repeated + "yes", repeated + "no", repeated + "hm"], ranks=[1, 2, 3])
    texts = [repeated + text if rest is None else rest + text for text in ("yes", "no", "hm")]
    assert (row.completions, row.repeated) == (tuple(texts), "kept" if rest is None else "cut")
    said = [{"role": "assistant", "content": repeated + "yes"}]
    assert read(prompt=[{"role": "user", "content": prompt}], completion=said, label=True).repeated == "kept"


def test_answers_may_repeat_the_prompt_with_or_without_its_system_text():
    for before in ("", "Be kind to me.\n\n"):
        row = read(system="Be kind to me.", prompt=LONG, chosen=before + LONG + " a", rejected=before + LONG + " b")
        assert (row.prompt, row.completions) == (f"Be kind to me.\n\n{LONG}", (" a", " b"))


def test_a_system_text_of_one_word_is_no_part_of_the_question():
    assert read(PAIR, system="Say").prompt == "Say\n\nSay hi to me"


@pytest.mark.parametrize("mark", ["\n\nHuman: {}\n\nAssistant: ", "User: {}\nBot: ", "<|im_start|>user\n{}<|im_end|>"])
def test_answers_that_are_whole_dialogues_are_refused_beside_their_prompt(mark):
    sides = {name: mark.format("Say hi to me") + name for name in ("chosen", "rejected")}
    with pytest.raises(BadRow, match="a dialogue that holds the prompt again"):
        read(PAIR, sides)
    assert read_prompt(PAIR | sides, "f", 1).prompt == "Say hi to me"


def test_a_prompt_that_ends_with_one_of_the_answers_is_refused():
    said = [*USER, {"role": "assistant", "content": "Salut"}]
    with pytest.raises(BadRow, match="ends with an answer of the assistant") as error:
        read(messages=said, chosen="Salut", rejected="Go away")
    assert error.value.field == "messages"
    other = [*USER, {"role": "assistant", "content": "Go away"}]
    assert read(messages=said, chosen=said, rejected=other).prompt == USER


def test_a_prompt_that_is_null_is_not_guessed_from_the_answers():
    with pytest.raises(BadRow, match="missing") as error:
        read(IMPLICIT, prompt=None)
    assert error.value.field == "prompt"
    assert read_row({**IMPLICIT, "prompt": None}, "f", 1, ignore=["prompt"]).prompt == "Say hi."


def test_two_labels_that_contradict_each_other_are_refused():
    with pytest.raises(BadRow, match="it contradicts `label`"):
        read(LONE, label=1, kto_tag=0)


@pytest.mark.parametrize(
    "mark", [{"training": False}, {"trainable": False}, {"loss_mask": 0}, {"training_detail": [1]}]
)
def test_a_message_that_is_not_to_be_learnt_is_refused(mark):
    with pytest.raises(BadRow, match="has the weight 0|weights of parts of a message"):
        read(messages=[*USER, {"role": "assistant", "content": "Salut", **mark}], label=True)


def test_a_message_written_as_text_is_refused():
    with pytest.raises(BadRow, match="written as text"):
        read(PAIR, chosen='{"role": "assistant", "content": "Salut"}')


def test_a_whole_number_that_no_float_holds_is_refused():
    with pytest.raises(BadRow, match="beyond float64"):
        read(prompt="p", completions=["a", "b"], scores=[10**400, 1])
    assert read(PAIR, score_chosen=10**400, score_rejected=1).unread == ("score_chosen", "score_rejected")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STORY)


def prepare(tmp_path, rows, tokenizer, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(str(file), eval_fraction=0.0, tokenizer=tokenizer, **options)


def test_the_audit_counts_the_columns(tmp_path, tokenizer):
    rows = [{**PAIR, "topic": "t", "context": "Paris, France"}, {**PAIR, "topic": "u", "lang": "fr"}]
    prepared = prepare(tmp_path, rows, tokenizer, ignore=["context"])
    (source,) = prepared.audit.to_dict()["sources"]
    assert source["columns_not_read"] == {"topic": 2, "lang": 1} and source["columns_ignored"] == {"context": 1}
    line = in_one_line(prepared.audit)
    assert "columns not read: topic (2 rows), lang (1 row)" in line
    assert "columns ignored by request: context (1 row)" in line


def test_a_name_to_ignore_that_no_row_has_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="data.ignore: no row has a column `topics`"):
        prepare(tmp_path, [{**PAIR, "topic": "t"}], tokenizer, ignore=["topics"])


def test_a_lone_completion_needs_a_label_where_it_is_judged(tmp_path, tokenizer):
    row = {"prompt": "Say hi", "completion": "Salut", "mood": "glad"}
    options = {"min_completions": 1, "append_eos": True}
    assert len(prepare(tmp_path, [row], tokenizer, **options).train) == 1
    with pytest.raises(UserError, match=r"row 1, field label: missing \(columns not read: mood\)"):
        prepare(tmp_path, [row], tokenizer, needs_label=True, **options)


@pytest.mark.parametrize("name", ["score", "rating", "reward"])
def test_the_reward_of_a_lone_completion_is_no_label(tmp_path, tokenizer, name):
    rows = [{"prompt": "Say hi", "completion": "Salut", name: value} for value in (1, 0)]
    options = {"min_completions": 1, "append_eos": True, "needs_label": True}
    with pytest.raises(UserError, match="field label: missing, and the reward of a lone completion says nothing"):
        prepare(tmp_path, rows, tokenizer, **options)
    assert prepare(tmp_path, rows, tokenizer, grades="raw", **options).train["grades"][:] == [[1.0], [0.0]]


def test_a_completion_that_is_labelled_bad_is_not_imitated(tmp_path, tokenizer):
    rows = [{"prompt": "Say hi", "completion": text, "label": text == "Salut"} for text in ("Salut", "Go away")]
    prepared = prepare(tmp_path, rows, tokenizer, min_completions=1, imitate=True)
    assert prepared.audit.refused == {"its only completion is graded 0, as a label that is false": 1}
    assert [row.completions for row in prepared.train_rows] == [("Salut",)]


WORDS = st.sampled_from(["red", "green", "blue", "warm", "cold", "sun", "moon", "sea"])
TEXT = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
NAMES = st.sampled_from(
    ["question", "query", "input", "context", "system", "system_prompt", "history", "persona", "label", "kto_tag"]
    + ["response", "output_1", "topic", "source", "notes", "ask", "about", "remark", "reference", "answer", "gold"]
    + ["weight", "template", "score_chosen", "messages", "rejected_text"]
)
SHAPES = st.sampled_from(["pair", "implicit", "list", "items", "lone", "chat"])


def shaped(shape, prompt, best, worst):
    said = [{"role": "assistant", "content": best}], [{"role": "assistant", "content": worst}]
    asked = [{"role": "user", "content": prompt}]
    return {
        "pair": {"prompt": prompt, "chosen": best, "rejected": worst},
        "implicit": {"chosen": f"{prompt} {best}", "rejected": f"{prompt} {worst}"},
        "list": {"prompt": prompt, "completions": [best, worst], "grades": [1, 0]},
        "items": {"prompt": prompt, "items": [{"text": best, "score": 1}, {"text": worst, "score": 0}]},
        "lone": {"prompt": prompt, "completion": best, "label": True},
        "chat": {"chosen": asked + said[0], "rejected": asked + said[1]},
    }[shape]


@settings(max_examples=100, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(shape=SHAPES, texts=st.tuples(TEXT, TEXT, TEXT), extra=st.dictionaries(NAMES, TEXT, max_size=3))
def test_every_text_is_in_the_token_ids_or_in_the_audit_or_refused(shape, texts, extra, tmp_path_factory, tokenizer):
    """Texts carry the name of their place, so that each can be told apart in the decoded tokens."""
    prompt, best, worst = (f"{text} {mark}" for text, mark in zip(texts, ("zz", "yy", "xx"), strict=True))
    row = shaped(shape, prompt, best, worst)
    extra = {name: f"{text} {name}" for name, text in extra.items() if name not in row}
    row |= extra
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    options = {"chat_template": template, "min_completions": 1, "append_eos": True}
    try:
        prepared = prepare(tmp_path_factory.mktemp("rows"), [row], tokenizer, **options)
    except UserError as error:
        assert any(name in str(error) for name in extra), error
        return
    entry = prepared.train[0]
    decoded = "\n".join(tokenizer.decode(entry["prompt_ids"] + ids) for ids in entry["completion_ids"])
    unread = prepared.audit.to_dict()["sources"][0]["columns_not_read"]
    assert prompt in decoded and best in decoded
    for name, text in extra.items():
        assert text in decoded or name in unread, name


@pytest.mark.parametrize(
    "names", [["winner"], ["items[].system"], ["winner", "a[].b"], ["my column"], ["it's"], ["été"]]
)
def test_what_a_refusal_says_to_type_is_read_as_the_columns(names):
    """Through a shell's words and YAML, as the command line reads them."""
    said = re.fullmatch(r"leave it out with (.*) \(without a recipe (.*)\)", how_to_ignore(*names))
    (override,) = shlex.split(said[1])
    assert yaml.safe_load(override.removeprefix("data.ignore=")) == names
    assert [word for word in shlex.split(said[2]) if word != "--ignore"] == names


def test_what_a_template_drops_says_what_to_type():
    said = re.search(r"'data.ignore=.*?\]'", IGNORE.format("name"))[0]
    assert yaml.safe_load(shlex.split(said)[0].removeprefix("data.ignore=")) == ["chosen[].name"]
