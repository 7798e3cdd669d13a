"""Any spelling of a conversation, of its tools and of what was thought becomes the same messages."""

import json
import random
from copy import deepcopy

import pytest
from spellings import SPELLINGS, conversation_of, older_openai, without_ids

from align.data.bad_row import BadRow
from align.data.formats import read_row
from align.data.messages import conversation
from align.data.tools import read_tools
from rewards.spelling import message_text

TALKS = [conversation_of(random.Random(seed)) for seed in range(40)]


@pytest.mark.parametrize("name", SPELLINGS)
def test_any_spelling_of_a_conversation_gives_the_same_messages(name):
    spell, sayable = SPELLINGS[name]
    for talk in TALKS:
        spelled = spell(deepcopy(talk))
        given = deepcopy(spelled)
        assert conversation(spelled, "messages") == sayable(talk)
        assert spelled == given, "a row is not changed where it is read"


def test_the_older_calls_of_functions_are_calls_of_tools():
    """They have no ids, one call in a message, and the function's name beside its result."""
    single = [talk for talk in TALKS if all(len(message.get("tool_calls", [1])) == 1 for message in talk)]
    assert any("tool_calls" in message for talk in single for message in talk)
    for talk in single:
        found = conversation(older_openai(deepcopy(talk)), "messages")
        named = {message.pop("name", None) for message in found if message["role"] == "tool"}
        assert found == without_ids(talk)
        assert named == {call["function"]["name"] for message in talk for call in message.get("tool_calls", ())}


WEATHER = {"name": "get_weather", "arguments": {"city": "Paris"}}
ONE = [
    ({"role": "assistant", "content": None, "refusal": "No."}, [{"role": "assistant", "content": "No."}]),
    (
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        [{"role": "assistant", "content": "No."}],
    ),
    ({"role": "developer", "content": "Be brief."}, [{"role": "developer", "content": "Be brief."}]),
    ({"role": "user", "content": "hi", "name": "Ann"}, [{"role": "user", "content": "hi", "name": "Ann"}]),
    ({"role": "user", "content": ["a", {"text": "b"}]}, [{"role": "user", "content": "ab"}]),
    ({"role": "user", "content": {"type": "text", "text": "a"}}, [{"role": "user", "content": "a"}]),
    ({"role": "tool", "content": {"degrees": 20}}, [{"role": "tool", "content": '{"degrees": 20}'}]),
    (
        {"role": "tool", "content": {"text": "a", "score": 1}},
        [{"role": "tool", "content": '{"text": "a", "score": 1}'}],
    ),
    ({"role": "tool", "content": [1, 2]}, [{"role": "tool", "content": "[1, 2]"}]),
    ({"role": "tool", "content": 20}, [{"role": "tool", "content": "20"}]),
    ({"role": "tool", "content": None, "name": "f"}, [{"role": "tool", "content": "", "name": "f"}]),
    ({"role": "tool", "content": "4", "tool_use_id": "a"}, [{"role": "tool", "content": "4", "tool_call_id": "a"}]),
    (
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]},
        [{"role": "tool", "content": "", "tool_call_id": "a"}],
    ),
    (
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "4"}, "and?"]},
        [{"role": "tool", "content": "4", "tool_call_id": "a"}, {"role": "user", "content": "and?"}],
    ),
    (
        {"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": WEATHER}]}],
    ),
    (
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": ""}, "index": 0}]},
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
            }
        ],
    ),
    (
        {"role": "assistant", "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}, "a"]},
        [{"role": "assistant", "content": "a", "reasoning_content": "so"}],
    ),
    ({"role": "assistant", "content": "a", "reasoning": "", "thinking": None}, [{"role": "assistant", "content": "a"}]),
    ({"role": "assistant", "content": "a", "weight": 0}, [{"role": "assistant", "content": "a", "weight": 0.0}]),
    ({"role": "assistant", "content": "a", "train": False}, [{"role": "assistant", "content": "a", "weight": 0.0}]),
    ({"role": "assistant", "content": "a", "loss_scale": 0.5}, [{"role": "assistant", "content": "a", "weight": 0.5}]),
    ({"role": "assistant", "content": "a", "loss": True}, [{"role": "assistant", "content": "a"}]),
    ({"role": "user", "content": "a", "weight": 0}, [{"role": "user", "content": "a"}]),
]


@pytest.mark.parametrize("number", range(len(ONE)))
def test_what_one_message_becomes(number):
    entry, expected = ONE[number]
    assert conversation([entry], "messages") == expected
    assert conversation(expected, "messages") == expected


def test_calls_in_content_and_beside_it_are_there_once():
    """As LangChain writes Anthropic's messages."""
    block = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Paris"}}
    call = {"id": "a", "type": "function", "function": WEATHER}
    (message,) = conversation([{"role": "assistant", "content": [block], "tool_calls": [call]}], "m")
    assert message["tool_calls"] == [call]


def test_messages_as_plain_text():
    call = {"type": "function", "function": WEATHER}
    shown = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert message_text({"role": "assistant", "content": "a", "tool_calls": [call]}) == f"a\n{shown}"
    assert message_text({"role": "assistant", "content": "", "tool_calls": [call, call]}) == f"{shown}\n{shown}"
    assert message_text({"role": "user", "content": ""}) == ""


CALL = {"name": "f", "arguments": "{}"}
REFUSED = [
    ({"content": "a"}, "m[0]: a message with the keys content; name them `role` and `content`"),
    ({"role": "user"}, "m[0]: a message with the keys role; name them `role` and `content`"),
    (
        {"from": "narrator", "value": "a"},
        "m[0].from: unknown role 'narrator'; use one of system, developer, user, assistant, tool",
    ),
    ({"role": 3, "content": "a"}, "m[0].role: unknown role 3; use one of system, developer, user, assistant, tool"),
    ({"role": "user", "content": 3}, "m[0].content: a number, not text; "),
    ({"role": "user", "content": "a", "images": ["x"]}, "m[0].images: images, audio and video are not read; "),
    (
        {"role": "assistant", "content": None, "audio": {"id": "x"}},
        "m[0].audio: images, audio and video are not read; ",
    ),
    *(
        ({"role": "user", "content": ["a", {"type": named}]}, f"m[0].content[1]: a part of type '{named}', not text; ")
        for named in ("image", "image_url", "input_audio", "video", "file", "document", "redacted_thinking", "x")
    ),
    (
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image", "source": {}}]}]},
        "m[0].content[0][0]: a part of type 'image', not text; ",
    ),
    ({"role": "tool", "content": [{"type": "image"}]}, "m[0].content[0]: a part of type 'image', not text; "),
    ({"role": "user", "content": [{"type": "text", "text": 3}]}, "m[0].content[0]: a part of type 'text', not text; "),
    (
        {"role": "assistant", "content": ["a", {"type": "thinking", "thinking": "b"}]},
        "m[0].content[1]: reasoning behind text or a tool call, where no chat template can write it; put it before",
    ),
    (
        {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}, "a"]},
        "m[0].content[1]: text behind a tool call, where no chat template can write it; put it before them, or into",
    ),
    (
        {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}, {"type": "tool_result"}]},
        "m[0]: tool results beside tool_calls; give each in a message of its own",
    ),
    (
        {"role": "assistant", "content": "a", "reasoning": "b", "thinking": "c"},
        "m[0].thinking: another reasoning than `reasoning` has; keep one of the two",
    ),
    (
        {"role": "user", "content": "a", "function_call": CALL},
        "m[0]: a tool call of the user's; only the assistant calls",
    ),
    ({"role": "assistant", "tool_calls": {"a": 1}}, "m[0].tool_calls: an object, not a list; give one object for each"),
    ({"role": "assistant", "tool_calls": "[{"}, "m[0].tool_calls: no JSON ("),
    ({"role": "assistant", "tool_calls": [3]}, "m[0].tool_calls[0]: a number, not a tool call; give an object with"),
    (
        {"role": "assistant", "tool_calls": [{"id": "a"}]},
        "m[0].tool_calls[0]: a tool call without a function's name (keys: id); give `name` and `arguments`",
    ),
    (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        "m[0].tool_calls[0]: no JSON (",
    ),
    (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
        "m[0].tool_calls[0]: the arguments are a list; give an object of arguments by name, or its JSON",
    ),
    ({"from": "function_call", "value": "f(x)"}, "m[0]: no JSON ("),
    (
        {"role": "assistant", "content": "a", "weight": -1},
        "m[0].weight: not a weight of a message; give a number, 0 or",
    ),
    ({"role": "assistant", "content": "a", "weight": float("nan")}, "m[0].weight: not a weight of a message; "),
    ({"role": "assistant", "content": "a", "weight": 10**400}, "m[0].weight: not a weight of a message; "),
    ({"role": "assistant", "content": "a", "train": "no"}, "m[0].train: not a weight of a message; "),
    (
        {"role": "assistant", "content": "a", "train": True, "loss": 0},
        "m[0].train: another weight than `loss` has; keep",
    ),
    (
        {"role": "user", "content": "a", "weight": 0.5},
        "m[0].weight: a weight of the user's message; only the assistant's",
    ),
    (
        {"role": "assistant", "content": "a", "training_detail": [{}]},
        "m[0].training_detail: weights of parts of a message",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_message_that_cannot_be_read_is_one_sentence(number):
    entry, expected = REFUSED[number]
    with pytest.raises(BadRow) as refusal:
        conversation([entry], "m")
    assert f"{refusal.value.field}: {refusal.value.problem}; {refusal.value.remedy}".startswith(expected)


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
BARE = {"name": "get_weather", "description": "d", "parameters": SCHEMA}
FULL = {"type": "function", "function": BARE}
TOOLS = [
    [FULL],
    [{"function": BARE}],
    [BARE],
    {"type": "function", **BARE},
    [{"type": "function", **BARE}],
    [{"name": "get_weather", "description": "d", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}],
    [{"type": "custom", "name": "get_weather", "description": "d", "input_schema": SCHEMA}],
    [{"functionDeclarations": [BARE]}],
    json.dumps([FULL]),
    json.dumps([BARE]),
    [json.dumps(FULL)],
    [{**FULL, "strict": None, "function": {**BARE, "parameters": {**SCHEMA, "items": None}}}],
]


@pytest.mark.parametrize("number", range(len(TOOLS)))
def test_any_spelling_of_tools_gives_the_same_schemas_in_their_order(number):
    found = read_tools(TOOLS[number], "tools")
    assert json.dumps(found) == json.dumps([FULL])
    assert read_tools(found, "tools") == found


def test_no_tools_and_what_json_says_of_null():
    assert [read_tools(value, "tools") for value in ([], "", " ", "[]", "null", [{}][1:])] == [None] * 6
    text = '[{"name": "f", "parameters": {"default": null}}]'
    assert read_tools(text, "tools")[0]["function"]["parameters"] == {"default": None}


BAD_TOOLS = [
    (3, "tools: a number, not a list; give a list of function schemas, or its JSON"),
    ("f(x)", "tools: no JSON ("),
    ([3], "tools[0]: a number, not a tool; give a function schema with `name` and `parameters`"),
    ([FULL, {"function": {}}], "tools[1]: a tool without a name (keys: function); give"),
    ([{"type": "web_search_20250305", "name": "web_search"}], "tools[0]: a tool of type 'web_search_20250305'; give"),
]


@pytest.mark.parametrize("number", range(len(BAD_TOOLS)))
def test_tools_that_cannot_be_read_are_one_sentence(number):
    value, expected = BAD_TOOLS[number]
    with pytest.raises(BadRow) as refusal:
        read_tools(value, "tools")
    assert f"{refusal.value.field}: {refusal.value.problem}; {refusal.value.remedy}".startswith(expected)


ASKED = [{"role": "user", "content": "Warm?"}]


def test_a_row_has_its_tools_under_either_name_and_ignores_them_by_request():
    for name in ("tools", "functions"):
        raw = {"prompt": ASKED, "chosen": "a", "rejected": "b", name: [BARE]}
        assert read_row(raw, "r", 1).tools == [FULL]
        ignoring = read_row(raw, "r", 1, ignore=[name])
        assert (ignoring.tools, ignoring.unread) == (None, ())
    assert read_row({"prompt": ASKED, "chosen": "a", "rejected": "b", "tools": []}, "r", 1).tools is None


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "p", "chosen": "a", "rejected": "b", "tools": [BARE]},
        {"prompt_ids": [1], "completion_ids": [2], "tools": [BARE]},
    ],
)
def test_tools_that_no_template_would_write_are_refused(raw):
    with pytest.raises(BadRow, match="tools beside a prompt that is no conversation"):
        read_row(raw, "r", 1)


def test_tools_of_one_side_are_refused():
    raw = {"prompt": ASKED, "chosen": "a", "rejected": "b", "tools": [BARE], "rejected_tools": [BARE]}
    with pytest.raises(BadRow, match="looks like tools of one side"):
        read_row({**raw, "rejected_tools": [{**BARE, "name": "other"}]}, "r", 1)
