"""Tools, calls, results and reasoning through the chat templates that TRL ships: TRL's tokens, or a refusal by name."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_templates import TEMPLATES, with_their_tokens
from datasets import Dataset
from read_rows import read_rows

from align.data.formats import read_row
from align.data.tokenize import Reading, encode_prompt, tokenize_rows
from align.errors import UserError
from rewards.texts import joint_ids, plain, text_key
from rewards.types import Asked, RowError

trl = pytest.importorskip("trl", reason="TRL, whose templates these are, is not installed")
SHIPPED = {file.stem: file for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
READING = Reading(max_length=100_000, append_eos=False)

TEXT_ARGUMENTS = ("deepseekv3", "deepseek_r1_distill", "deepseek_r1_distill_training")
"""Templates that join a call's arguments to other text."""
NULL_CONTENTS = ("deepseek_r1_distill", "deepseek_r1_distill_training")
"""Templates that write a call only where the content is null."""
THINKING = ("gptoss", "gptoss_training", "lfm2_2_5")
"""Templates that read what was thought under `thinking`."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How warm it is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}


def call(name="get_weather", number=1, **arguments):
    return {"id": f"abcdefgh{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": "How warm is it in the west, and what is 'the time'?"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [call(city='Nantes "sur" Loire\n')]}
RESULT = {
    "role": "tool",
    "content": '{"degrees": 21,\n "sky": "grey"}',
    "tool_call_id": "abcdefgh1",
    "name": "get_weather",
}
WARM, COLD = ({"role": "assistant", "content": text} for text in ("It is 21 degrees.", "I do not know."))
THOUGHT = {**WARM, "reasoning_content": "Twenty-one it says."}

ROWS = {
    "tools": {"prompt": [USER], "chosen": [WARM], "rejected": [COLD], "tools": [WEATHER, CLOCK]},
    "a result": {"prompt": [USER, CALLING, RESULT], "chosen": [WARM], "rejected": [COLD], "tools": [WEATHER]},
    "a call to learn": {"prompt": [USER], "chosen": [CALLING], "rejected": [COLD], "tools": [WEATHER]},
    "a trajectory": {"prompt": [USER], "chosen": [CALLING, RESULT, WARM], "rejected": [COLD], "tools": [WEATHER]},
    "calls without tools": {"prompt": [USER, CALLING, RESULT], "chosen": [WARM], "rejected": [COLD]},
    "reasoning": {"prompt": [USER], "chosen": [THOUGHT], "rejected": [COLD]},
    "options": {
        "prompt": [USER],
        "chosen": [WARM],
        "rejected": [COLD],
        "tools": [WEATHER],
        "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"},
    },
}
"""What is in a row -> the row."""
NEEDED = {
    "tools": ("How warm it is.", "The time."),
    "a result": ("How warm it is.", "get_weather", "Nantes", "21", "grey"),
    "a call to learn": ("How warm it is.", "get_weather", "Nantes"),
    "a trajectory": ("How warm it is.", "get_weather", "Nantes", "21", "grey"),
    "calls without tools": ("get_weather", "Nantes", "21", "grey"),
    "reasoning": ("Twenty-one it says.",),
    "options": ("How warm it is.",),
}
"""What every rendering of such a row must hold."""


@pytest.fixture(scope="module")
def tokenizer(byte_level):
    return with_their_tokens(byte_level)


def as_wanted(name, messages):
    """Messages as the template wants them, which TRL leaves to the user."""
    spelled = []
    for message in messages:
        own = dict(message)
        if "tool_calls" in own and name in NULL_CONTENTS:
            own["content"] = None
        if "tool_calls" in own and name in TEXT_ARGUMENTS:
            own["tool_calls"] = [
                {**one, "function": {**one["function"], "arguments": json.dumps(one["function"]["arguments"])}}
                for one in own["tool_calls"]
            ]
        if "reasoning_content" in own and name in THINKING:
            own["thinking"] = own.pop("reasoning_content")
        spelled.append(own)
    return spelled


def trl_ids(tokenizer, name, row):
    """Prompt, chosen and rejected as TRL's DPOTrainer has them; None where the template takes no such row."""
    from jinja2 import TemplateError
    from trl import DPOTrainer

    sides = {side: as_wanted(name, row[side]) for side in ("prompt", "chosen", "rejected")}
    # one row, its tools as JSON text: Arrow would give every tool the keys of the others
    data = Dataset.from_list([{**row, **sides, "tools": json.dumps(row.get("tools") or None)}])
    if any("tool_calls" in message for messages in sides.values() for message in messages):
        data = data.with_transform(lambda batch: {key: [without_nulls(own) for own in batch[key]] for key in batch})
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    try:
        own = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, arguments, "train")[0]
    except (TemplateError, TypeError):
        return None
    return own["prompt_ids"], own["chosen_ids"], own["rejected_ids"]


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(own) for key, own in value.items() if own is not None or key == "content"}
    return [without_nulls(own) for own in value] if isinstance(value, list) else value


def our_ids(tokenizer, row, **reading):
    return tokenize_rows([read_row(row, "r", 1)], tokenizer=tokenizer, reading=replace(READING, **reading))[0]


@pytest.mark.parametrize("what", ROWS)
@pytest.mark.parametrize("name", SHIPPED)
def test_tokens_are_trls_or_the_row_is_refused_for_what_would_be_lost(name, what, tokenizer, monkeypatch):
    """Two-sided: what is tokenised holds all that the row holds, and what is refused would have lost some of it."""
    monkeypatch.setattr(tokenizer, "chat_template", SHIPPED[name].read_text())
    row = ROWS[what]
    theirs = trl_ids(tokenizer, name, row)
    texts = None if theirs is None else [tokenizer.decode(theirs[0] + own) for own in theirs[1:]]
    try:
        entry = our_ids(tokenizer, row, learn="completion" if what == "a trajectory" else "assistant")
    except UserError as error:
        missing = texts is None or not all(needed in texts[0] for needed in NEEDED[what])
        assert missing, error
        assert "the chat template drops" in str(error) or (texts is None and "the chat template refuses" in str(error))
        return
    assert theirs is not None and all(needed in texts[0] for needed in NEEDED[what])
    assert entry["prompt_ids"] == theirs[0]
    for ours, whole in zip(entry["completion_ids"], theirs[1:], strict=True):
        assert whole[: len(ours)] == ours
        assert tokenizer.decode(whole[len(ours) :]).strip() == ""


CHATML = TEMPLATES["chatml"]
NAMED = {**USER, "name": "Ann"}
DROPS = [
    ({"prompt": [USER], "tools": [WEATHER]}, "the row's tools; set .* or leave them out with data.ignore=\\[tools\\]"),
    (
        {"prompt": [USER, CALLING, RESULT]},
        "the tool calls of message 2 \\(assistant\\); set `policy.chat_template` to one",
    ),
    ({"prompt": [USER], "chosen": [CALLING]}, "the tool calls of message 2 \\(assistant\\)"),
    (
        {"prompt": [NAMED]},
        "the `name` of message 1 \\(user\\); .* or leave it out of the column .*ignore=\\[.chosen\\[\\].name.\\]",
    ),
    ({"chosen": [{**WARM, "name": "Bob"}]}, "the `name` of message 2 \\(assistant\\)"),
    (
        {"chosen": [THOUGHT]},
        "the reasoning \\(`reasoning_content`\\) of message 2 \\(assistant\\); .*chosen\\[\\].reasoning",
    ),
    ({"chosen": [THOUGHT, USER, WARM]}, "the reasoning \\(`reasoning_content`\\) of message 2 \\(assistant\\)"),
]
"""What a row has beside ROWS' plain one -> what chatml drops of it."""
PLAIN = {"prompt": [USER], "chosen": [WARM], "rejected": [COLD]}


@pytest.mark.parametrize("number", range(len(DROPS)))
def test_what_a_template_drops_is_named_with_the_remedy(number, tokenizer, monkeypatch):
    row, expected = DROPS[number]
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    with pytest.raises(UserError, match=f"^r, row 1: the chat template drops {expected}"):
        our_ids(tokenizer, {**PLAIN, **row})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML.replace("m.content", "(m.content if m.role != 'tool' else '')"), "the tool's result of message 3"),
        (CHATML.replace("m.content", "m.content.split('21')[-1]"), "a part of the content of message 2"),
        ("{{ tools[0].function.name if tools }}" + CHATML, "the tool `clock`"),
    ],
)
def test_what_a_template_drops_in_part_is_named_too(template, expected, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    row = {**PLAIN, "prompt": [USER, WARM, RESULT]} if "result" in expected else {**PLAIN, "tools": [WEATHER, CLOCK]}
    row = {key: own for key, own in row.items() if key != "tools" or "tool `" in expected}
    with pytest.raises(UserError, match=f"the chat template drops {expected}"):
        our_ids(tokenizer, row)


def test_what_a_template_may_leave_out_is_counted(tokenizer, monkeypatch):
    """Reasoning of earlier turns, a result's name beside its call, ids, and keys that only some template knows."""
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    entry = our_ids(tokenizer, {**PLAIN, "prompt": [USER, {**THOUGHT, "notes": "n"}, USER]})
    assert entry["prompt_left_out"] == ["assistant notes", "assistant reasoning_content"]
    entry = our_ids(tokenizer, {**PLAIN, "chosen": [THOUGHT, USER, WARM]}, learn="last")
    assert entry["completion_left_out"] == ["reasoning_content"]
    entry = our_ids(tokenizer, {**PLAIN, "chosen": [{**THOUGHT, "weight": 0}, USER, WARM]})
    assert entry["completion_left_out"] == ["reasoning_content"]
    monkeypatch.setattr(tokenizer, "chat_template", SHIPPED["qwen3"].read_text())
    assert our_ids(tokenizer, ROWS["a result"])["prompt_left_out"] == []


def test_keys_of_messages_are_left_out_by_request(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    row = {"prompt": [USER], "completions": [[THOUGHT], [COLD]], "grades": [1, 0]}
    plain = {"prompt": [USER], "completions": [[WARM], [COLD]], "grades": [1, 0]}
    for own, other, name in (
        (row, plain, "completions[].reasoning_content"),
        ({**PLAIN, "chosen": THOUGHT}, PLAIN, "chosen[].reasoning_content"),
        ({**PLAIN, "prompt": [NAMED]}, PLAIN, "prompt[].name"),
    ):
        assert read_row(own, "r", 1, ignore=[name]) == read_row(other, "r", 1)


SCORERS_OWN = ("cohere", "deepseekv3", "gemma", "glm4moe", "gptoss", "llama3_1", "qwen2_5", "qwen3", "qwen3_5_think")


@pytest.mark.parametrize("what", ROWS)
@pytest.mark.parametrize("name", SCORERS_OWN)
def test_a_scorer_reads_a_row_as_a_reward_models_training_does_or_refuses_it_too(name, what, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", SHIPPED[name].read_text())
    row = read_row(ROWS[what], "r", 1)
    prompt = Asked.of(row.prompt, row.template_arguments)
    try:
        entry = our_ids(tokenizer, ROWS[what], append_eos=None)
    except UserError as error:
        with pytest.raises(RowError, match="the chat template (refuses|drops)") as refusal:
            joint_ids([prompt] * 2, row.completions, tokenizer)
        assert ("drops" in str(error)) == ("drops" in str(refusal.value))
        return
    whole = [entry["prompt_ids"] + ids for ids in entry["completion_ids"]]
    assert joint_ids([prompt] * 2, row.completions, tokenizer) == whole


def test_tools_and_options_tell_prompts_apart_and_stand_in_plain_text():
    given = [{}, {"tools": [WEATHER]}, {"tools": [CLOCK]}, {"enable_thinking": False}]
    prompts = [Asked.of([USER], own) for own in given]
    assert len({text_key(prompt) for prompt in prompts}) == len(given)
    assert text_key(prompts[0]) == text_key([USER]) and Asked.of("text", {"tools": [WEATHER]}) == "text"
    assert plain(prompts[0]) == USER["content"]
    assert plain(prompts[2]) == f"tools: {json.dumps([CLOCK])}\nuser: {USER['content']}"
    called = json.dumps(CALLING["tool_calls"][0]["function"])
    assert plain([CALLING]) == called
    assert (
        plain([CALLING, RESULT, WARM])
        == f"assistant: {called}\ntool: {RESULT['content']}\nassistant: {WARM['content']}"
    )


OPTION = "{% if shout %}{{ 'LOUD ' }}{% endif %}" + TEMPLATES["chatml"]


def read(tmp_path, tokenizer, rows, template=OPTION, **keys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(str(file), tokenizer=tokenizer, chat_template=template, eval_fraction=0, **keys)


def test_a_recipes_template_options_are_every_rows_and_a_rows_own_win(tmp_path, tokenizer):
    rows = [PLAIN, {**PLAIN, "chat_template_kwargs": {"shout": False}}, {**PLAIN, "chat_template_kwargs": {"x": 1}}]
    loud = read(tmp_path, tokenizer, rows, template_options={"shout": True})
    texts = [tokenizer.decode(entry["prompt_ids"]) for entry in loud.train]
    assert [text.startswith("LOUD") for text in texts] == [True, False, True]
    assert loud.audit.unread_options == {"x": 1}
    assert encode_prompt(loud.train_rows[0], tokenizer, OPTION) == loud.train[0]["prompt_ids"]
    own = read(tmp_path, tokenizer, [{**PLAIN, "chat_template_kwargs": {"shout": True}}])
    assert own.train[0]["prompt_ids"] == loud.train[0]["prompt_ids"]


@pytest.mark.parametrize(
    ("options", "template", "expected"),
    [
        ({"shuot": True}, OPTION, "data.template_options.shuot: nothing in the chat template reads it; mend the name"),
        ({"tools": []}, OPTION, "data.template_options.tools: not an option of the template's own; remove it"),
        ({"chat_template": "x"}, OPTION, "data.template_options.chat_template: .* set `policy.chat_template`"),
        ({"shout": True}, None, "data.template_options: there is no chat template; set `policy.chat_template`"),
    ],
)
def test_template_options_that_a_recipe_cannot_set_are_one_sentence(options, template, expected, tmp_path, tokenizer):
    with pytest.raises(UserError, match=f"^{expected}"):
        read(tmp_path, tokenizer, [{"prompt": "p", "chosen": "a", "rejected": "b"}], template, template_options=options)


SHIPS = Path(__file__).parents[2] / "recipes" / "templates" / "plain.jinja"
CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_plain_writes_a_conversation_without_tools_as_ever_and_names_beside_who_speaks(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", SHIPS.read_text())
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "<s>S\n\nUser: a\n\nAssistant: b</s>"
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert asked == "<s>S\n\nUser: a\n\nAssistant:"
    named = [{**message, "name": "Ann"} for message in CHAT]
    text = "<s>System (Ann): S\n\nUser (Ann): a\n\nAssistant (Ann): b</s>"
    assert tokenizer.apply_chat_template(named, tokenize=False) == text


@pytest.mark.parametrize("what", ROWS)
def test_plain_drops_nothing(what, tokenizer, monkeypatch):
    """The template that ships is a remedy for whatever another one drops; all that the assistant wrote is learnt."""
    monkeypatch.setattr(tokenizer, "chat_template", SHIPS.read_text())
    row = {**ROWS[what], "chat_template_kwargs": {}}
    entry = our_ids(tokenizer, row, append_eos=True)
    whole = tokenizer.decode(entry["prompt_ids"] + entry["completion_ids"][0])
    assert all(needed in whole for needed in NEEDED[what])
    places = entry["learn_at"][0] if what == "a trajectory" else range(len(entry["completion_ids"][0]))
    learnt = tokenizer.decode([entry["completion_ids"][0][place] for place in places])
    called = f" <tool_call>\n{json.dumps(CALLING['tool_calls'][0]['function'])}\n</tool_call></s>"
    warm = " It is 21 degrees.</s>"
    thought = f" <think>\nTwenty-one it says.\n</think>\n{warm[1:]}"
    special = {"a call to learn": called, "a trajectory": called + warm, "reasoning": thought}
    assert learnt == special.get(what, warm)


KNOW_NO_DEVELOPER = ("gemma3", "glm4moe", "phi3", "qwen2_5", "qwen3", "qwen3_5_think")


@pytest.mark.parametrize("name", [*KNOW_NO_DEVELOPER, "gptoss", "llama3_1"])
def test_a_developers_message_is_the_systems_where_a_template_knows_that_alone(name, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", SHIPPED[name].read_text())
    row = {**PLAIN, "prompt": [{"role": "developer", "content": "Be very brief."}, USER]}
    system = {**PLAIN, "prompt": [{"role": "system", "content": "Be very brief."}, USER]}
    entry = our_ids(tokenizer, row)
    assert "Be very brief." in tokenizer.decode(entry["prompt_ids"]) and entry["prompt_left_out"] == []
    theirs = trl_ids(tokenizer, name, system if name in KNOW_NO_DEVELOPER else row)
    assert entry["prompt_ids"] == theirs[0]
