"""Rows as publishers write them, beside the one of each in `data/formats`: what is read of them, typed out."""

import json
from copy import deepcopy

import pytest

from align.data.columns import texts_in
from align.data.formats import FORMAT, read_prompt, read_row
from align.data.schema import BadRow, UnusableRow


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CALLED_IN_JSON = {"role": "assistant", "content": None, "tool_calls": [deepcopy(CALL)]}
CALLED_IN_JSON["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'
PAIR = ([said("yes")], [said("no")])
EARLIER = [user("a"), said("b")]

CALL_TEXT = '{"name": "add", "arguments": {"a": 1}}'
CALLED_BARE = {**CALLED, "tool_calls": [{key: CALL[key] for key in ("type", "function")}]}
SEEN = {"role": "tool", "content": "2"}
TRAJECTORY = [CALLED_BARE, SEEN, said("yes")]

# what the row is: its format, the row, the prompt, the completions, grades, rewards
ROWS = {
    "openai, one message for a list": (
        "openai_preference",
        {"input": {"messages": [user("q")]}, "preferred_output": said("yes"), "non_preferred_output": "no"},
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
    "openai, earlier turns, and a call of a tool": (
        "openai_preference",
        {
            "input": {"messages": [SYSTEM, *EARLIER, user("q")], "tools": [TOOL], "parallel_tool_calls": None},
            "preferred_output": [CALLED_IN_JSON],
            "non_preferred_output": [said("no")],
        },
        ([SYSTEM, *EARLIER, user("q")], ([CALLED], PAIR[1]), (1.0, 0.0), None),
    ),
    "openai, the messages without the object around": (
        "openai_preference",
        {"input": [user("q")], "preferred_output": [said("yes")], "non_preferred_output": [said("no")]},
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
    "openai, an answer of several messages": (
        "openai_preference",
        {
            "input": {"messages": [user("q")], "tools": [TOOL]},
            "preferred_output": [CALLED_IN_JSON, {**SEEN, "tool_call_id": "c1"}, said("yes")],
            "non_preferred_output": [said("no")],
        },
        ([user("q")], ([CALLED, {**SEEN, "tool_call_id": "c1"}, said("yes")], PAIR[1]), (1.0, 0.0), None),
    ),
    "ms-swift, an agent's whole conversations": (
        "sharegpt",
        {
            "messages": [user("q"), {"role": "tool_call", "content": CALL_TEXT}]
            + [{"role": "tool_response", "content": "2"}, said("yes")],
            "rejected_messages": [user("q"), said("no")],
        },
        ([user("q")], (TRAJECTORY, PAIR[1]), (1.0, 0.0), None),
    ),
    "ms-swift, an agent's last answer": (
        "sharegpt",
        {
            "messages": [user("q"), {"role": "tool_call", "content": CALL_TEXT}]
            + [{"role": "tool_response", "content": "2"}, said("yes")],
            "rejected_response": "no",
        },
        ([user("q"), CALLED_BARE, SEEN], PAIR, (1.0, 0.0), None),
    ),
    "sharegpt, sides of several messages": (
        "sharegpt",
        {
            "conversations": [human("q")],
            "chosen": [{"from": "function_call", "value": CALL_TEXT}, {"from": "observation", "value": "2"}]
            + [gpt("yes")],
            "rejected": [gpt("no")],
        },
        ([user("q")], (TRAJECTORY, PAIR[1]), (1.0, 0.0), None),
    ),
    "sharegpt, whole conversations that part early": (
        "sharegpt",
        {
            "chosen": [human("q"), gpt("yes"), human("r"), gpt("fine")],
            "rejected": [human("q"), gpt("no"), human("r"), gpt("well")],
        },
        (
            [user("q")],
            ([said("yes"), user("r"), said("fine")], [said("no"), user("r"), said("well")]),
            (1.0, 0.0),
            None,
        ),
    ),
    "capybara, whole conversations that part late": (
        "distilabel_pair",
        {
            "source": "Know-Logic",
            "conversation": [{"input": "a", "output": "b"}, {"input": "q", "output": "maybe"}],
            "original_response": "maybe",
            "generation_prompt": ["You are kind. a b q"],
            "raw_generation_responses": ["never"],
            "new_generations": ["never"],
            "prompt": "q",
            "chosen": [*EARLIER, user("q"), said("yes")],
            "rejected": [*EARLIER, user("q"), said("no")],
            "rating_chosen": 5,
            "rating_rejected": 2,
            "chosen_model": "m",
            "turns": 2,
        },
        ([*EARLIER, user("q")], PAIR, (1.0, 0.0), (5.0, 2.0)),
    ),
    "gemini, scores that are no labels": (
        "gemini_preference",
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be "}, {"text": "brief."}]},
            "contents": [{"parts": [{"text": "q"}], "role": "user"}],
            "completions": [
                {"score": 0.25, "completion": {"parts": [{"text": "no"}]}},
                {"score": 0.75, "completion": {"role": "model", "parts": [{"text": "yes"}]}},
            ],
        },
        ([SYSTEM, user("q")], PAIR[::-1], None, (0.25, 0.75)),
    ),
    "gemini, an answer that calls a tool": (
        "gemini_preference",
        {
            "contents": [{"role": "user", "parts": [{"text": "q"}]}],
            "completions": [
                {"score": 1, "completion": {"role": "model", "parts": [{"functionCall": {"name": "add", "args": {}}}]}},
                {"score": 0, "completion": {"role": "model", "parts": [{"text": "no"}]}},
            ],
            "tools": [{"functionDeclarations": [{"name": "add"}]}],
        },
        (
            [user("q")],
            (
                [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
                    }
                ],
                PAIR[1],
            ),
            (1.0, 0.0),
            None,
        ),
    ),
    "openai, an object that a table holds as text": (
        "openai_preference",
        {"input": json.dumps({"messages": [user("q")]}), "preferred_output": "yes", "non_preferred_output": "no"},
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
    "a labelled conversation beside its prompt": (
        "completion",
        {"prompt": "q", "completion": [SYSTEM, user("q"), said("no")], "label": False},
        ([SYSTEM, user("q")], PAIR[1:], (0.0,), None),
    ),
    "a list of conversations beside their prompt": (
        "lists",
        {"prompt": [user("q")], "completions": [[user("q"), said("yes")], [user("q"), said("no")]], "ranks": [1, 2]},
        ([user("q")], PAIR, None, (-1.0, -2.0)),
    ),
    "gemini, keys that Parquet adds": (
        "gemini_preference",
        {
            "contents": [{"role": "user", "parts": [{"text": "q", "functionCall": None}]}],
            "completions": [
                {"score": True, "completion": {"role": None, "parts": [{"text": "yes"}]}},
                {"score": 0.0, "completion": {"role": "model", "parts": [{"text": "no"}]}},
            ],
        },
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
    "gemini, a demonstration": (
        "gemini_preference",
        {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "yes"}]}]},
        ([user("q")], PAIR[:1], None, None),
    ),
    "nova, three candidates, as Parquet gives them back": (
        "nova_preference",
        {
            "messages": [
                {"role": "user", "content": [{"text": "q"}], "candidates": None},
                {
                    "role": "assistant",
                    "content": None,
                    "candidates": [
                        {"content": [{"text": "no"}], "preferenceLabel": "non-preferred"},
                        {"content": [{"text": "y"}, {"text": "es"}], "preferenceLabel": "preferred"},
                        {"content": [{"text": "no"}], "preferenceLabel": "non-preferred"},
                    ],
                },
            ],
            "toolConfig": {"tools": [{"toolSpec": {"name": "add", "inputSchema": {"json": {"type": "object"}}}}]},
        },
        ([user("q")], (PAIR[1], PAIR[0], PAIR[1]), (0.0, 1.0, 0.0), None),
    ),
    "sharegpt, a labelled answer": (
        "sharegpt",
        {"conversations": [human("a"), gpt("b"), human("q"), gpt("no")], "kto_tag": False},
        ([*EARLIER, user("q")], PAIR[1:], (0.0,), None),
    ),
    "sharegpt, whole conversations": (
        "sharegpt",
        {"chosen": [human("q"), gpt("yes")], "rejected": [human("q"), gpt("no")]},
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
    "sharegpt, sides of a list, with a system text and tools beside": (
        "sharegpt",
        {
            "conversations": [human("q"), {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]
            + [{"from": "observation", "value": "2"}],
            "system": "Be brief.",
            "tools": json.dumps([TOOL]),
            "chosen": [gpt("yes")],
            "rejected": [gpt("no")],
        },
        (
            [
                SYSTEM,
                user("q"),
                CALLED_BARE,
                SEEN,
            ],
            PAIR,
            (1.0, 0.0),
            None,
        ),
    ),
    "sharegpt, messages in the usual spelling, texts as sides": (
        "sharegpt",
        {"conversations": [SYSTEM, user("q")], "chosen": "yes", "rejected": "no"},
        ([SYSTEM, user("q")], PAIR, (1.0, 0.0), None),
    ),
    "sharegpt, a list": (
        "sharegpt",
        {"conversations": [human("q")], "items": [{"text": "yes", "score": 2}, {"text": "no", "score": 1}]},
        ([user("q")], PAIR, None, (2.0, 1.0)),
    ),
    "sharegpt, turns of question and answer": (
        "sharegpt",
        {"system": "Be brief.", "conversation": [{"human": "a", "assistant": "b"}, {"human": "q", "assistant": "yes"}]},
        ([SYSTEM, *EARLIER, user("q")], PAIR[:1], None, None),
    ),
    "sharegpt, roles of Anthropic's": (
        "sharegpt",
        {
            "chosen": [{"role": "human", "content": "q"}, said("yes")],
            "rejected": [{"role": "human", "content": "q"}, said("no")],
        },
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
    "ms-swift, sharegpt with the rejected answer": (
        "sharegpt",
        {"conversations": [human("q"), gpt("yes")], "rejected_response": "no"},
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
    "ms-swift, whole rejected conversation": (
        "swift_pair",
        {
            "messages": [SYSTEM, *EARLIER, user("q"), said("yes")],
            "rejected_messages": [SYSTEM, *EARLIER, user("q"), said("no")],
        },
        ([SYSTEM, *EARLIER, user("q")], PAIR, (1.0, 0.0), None),
    ),
    "ms-swift, the rejected answer as a message": (
        "swift_pair",
        {"messages": [user("q"), said("yes")], "rejected_messages": [said("no")]},
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
    "ms-swift, several rejected answers": (
        "swift_pair",
        {"messages": [user("q"), said("yes")], "rejected_response": ["no", "never"]},
        ([user("q")], (*PAIR, [said("never")]), (1.0, 0.0, 0.0), None),
    ),
    "ms-swift, query and response": (
        "swift_pair",
        {"system": "Be brief.", "query": "q", "response": "yes", "rejected_response": "no", "history": [["a", "b"]]},
        ([SYSTEM, *EARLIER, user("q")], PAIR, (1.0, 0.0), None),
    ),
    "ms-swift, query and response alone": (
        "swift_pair",
        {"query": "q", "response": "yes", "rejected_response": "no"},
        ("q", ("yes", "no"), (1.0, 0.0), None),
    ),
    "alpaca, a pair": (
        "alpaca",
        {"instruction": "Say it:", "input": "q", "chosen": "yes", "rejected": "no"},
        ("Say it:\nq", ("yes", "no"), (1.0, 0.0), None),
    ),
    "alpaca, turns that a table holds as text": (
        "alpaca",
        {"instruction": "q", "history": "[['a', 'b']]", "chosen": "yes", "rejected": "no"},
        ([*EARLIER, user("q")], PAIR, (1.0, 0.0), None),
    ),
    "alpaca, a pair without an input": (
        "preference",
        {"instruction": "q", "input": "", "chosen": "yes", "rejected": "no", "history": []},
        ("q", ("yes", "no"), (1.0, 0.0), None),
    ),
    "alpaca, an output with a tag": (
        "alpaca",
        {"instruction": "Say it:", "input": "q", "output": "no", "system": "Be brief.", "kto_tag": False},
        ("Be brief.\n\nSay it:\nq", ("no",), (0.0,), None),
    ),
    "alpaca, an output of two": (
        "alpaca",
        {"instruction": "q", "input": "", "output": ["yes", "no"]},
        ("q", ("yes", "no"), (1.0, 0.0), None),
    ),
    "alpaca, a list": (
        "alpaca",
        {"instruction": "Say it:", "input": "q", "completions": ["yes", "no"], "ranks": [1, 2]},
        ("Say it:\nq", ("yes", "no"), None, (-1.0, -2.0)),
    ),
    "alpaca, earlier turns as messages": (
        "alpaca",
        {"prompt": "q", "history": EARLIER, "chosen": "yes", "rejected": "no"},
        ([*EARLIER, user("q")], PAIR, (1.0, 0.0), None),
    ),
    "distilabel, orca pairs": (
        "distilabel",
        {
            "system": "",
            "input": "q",
            "chosen": "yes",
            "rejected": "no",
            "generations": ["no", "yes"],
            "order": ["rejected", "chosen"],
            "labelling_model": "gpt",
            "labelling_prompt": [user("Which?")],
            "raw_labelling_response": "4 9",
            "rating": [4.0, 9.0],
            "rationale": "It is.",
            "status": "unchanged",
            "original_chosen": "yes",
            "original_rejected": "no",
            "chosen_score": 9.0,
        },
        ("q", ("no", "yes"), None, (4.0, 9.0)),
    ),
    "distilabel, ranks": (
        "distilabel",
        {
            "prompt": "q",
            "candidates_completions": ["no", "yes"],
            "ranks": [2, 1],
            "chosen": [user("q"), said("yes")],
            "rejected": [user("q"), said("no")],
        },
        ("q", ("no", "yes"), None, (-2.0, -1.0)),
    ),
    "distilabel, a conversation": (
        "distilabel",
        {"messages": [user("q")], "generations": ["yes", "no"], "ratings": [5, 1]},
        ([user("q")], PAIR, None, (5.0, 1.0)),
    ),
    "argilla, a ranking by two": (
        "argilla_record",
        {
            "id": "r1",
            "fields": {"instruction": "q", "response-1": "no", "response-2": "yes"},
            "metadata": {"m": 1},
            "responses": {
                "better": [
                    {"value": [{"value": "response-2", "rank": 1}, {"value": "response-1", "rank": 2}], "user_id": "u"},
                    {"value": ["response-2", "response-1"], "user_id": "v"},
                ]
            },
            "suggestions": {"better": {"value": ["response-1", "response-2"], "agent": "m"}},
            "status": "completed",
            "_server_id": "s",
        },
        ("q", ("no", "yes"), None, (-2.0, -1.0)),
    ),
    "argilla, votes with a tie": (
        "argilla_record",
        {
            "fields": {"instruction": "q", "gpt": "no", "claude": "yes"},
            "responses": {"best": [{"value": "claude"}, {"value": "claude"}, {"value": "gpt"}, {"value": "tie"}]},
        },
        ("q", ("no", "yes"), None, (0.375, 0.625)),
    ),
    "argilla, suggestions alone": (
        "argilla_record",
        {
            "fields": {"instruction": [user("q")], "generations-0": "yes", "generations-1": "no"},
            "responses": {},
            "suggestions": {"generations-0-rating": {"value": 5}, "generations-1-rating": {"value": 2}},
        },
        ([user("q")], PAIR, None, (5.0, 2.0)),
    ),
    "argilla, sides that are fields": (
        "argilla_record",
        {"fields": {"prompt": "q", "chosen": "yes", "rejected": "no"}, "responses": {"sure": [{"value": 3}]}},
        ("q", ("yes", "no"), (1.0, 0.0), None),
    ),
    "argilla, the older record": (
        "argilla_record",
        {
            "fields": {"prompt": "q", "response_a": "yes", "response_b": "no"},
            "responses": [
                {"user_id": "u", "status": "submitted", "values": {"choice": {"value": "response_a"}}},
                {"user_id": "v", "status": "discarded", "values": {"choice": {"value": "response_b"}}},
            ],
            "suggestions": [{"question_name": "choice", "value": "response_b"}],
        },
        ("q", ("yes", "no"), None, (1.0, 0.0)),
    ),
    "argilla, flat": (
        "argilla_record",
        {
            "status": "completed",
            "instruction": "q",
            "response_a": "yes",
            "response_b": "no",
            "topic": "small talk",
            "choice.responses": ["response_a", "response_b"],
            "choice.responses.users": ["u", "v"],
            "choice.responses.status": ["submitted", "draft"],
            "choice.suggestion": "response_b",
            "choice.suggestion.agent": "m",
        },
        ("q", ("yes", "no"), None, (1.0, 0.0)),
    ),
    "argilla, as it lies on the hub": (
        "argilla_record",
        {
            "prompt": "q",
            "response-1": "yes",
            "response-2": "no",
            "ranking": [],
            "ranking-suggestion": [{"value": "response-1", "rank": 1}, {"value": "response-2", "rank": 2}],
            "ranking-suggestion-metadata": {"type": None},
            "external_id": "e",
            "metadata": "{}",
        },
        ("q", ("yes", "no"), None, (-1.0, -2.0)),
    ),
    "response_j and response_k": (
        "chosen_response",
        {"question": "q", "response_j": "yes", "response_k": "no", "qid": 7},
        ("q", ("yes", "no"), (1.0, 0.0), None),
    ),
    "chosen_response as conversations": (
        "chosen_response",
        {"chosen_response": [user("q"), said("yes")], "rejected_response": [user("q"), said("no")]},
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
    "prometheus without its own instruction": (
        "prometheus",
        {"instruction": "q", "orig_response_A": "yes", "orig_response_B": "no", "orig_preference": "A"},
        ("q", ("yes", "no"), (1.0, 0.0), None),
    ),
    "a first step": (
        "step_pair",
        {"prompt": "q", "initial_reason_steps": "", "chosen": "yes", "rejected": "no", "answer": "3"},
        ([user("q")], PAIR, (1.0, 0.0), None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_as_it_is_published(name):
    _, raw, expected = deepcopy(ROWS[name])
    row = read(raw)
    assert (row.prompt, row.completions, row.grades, row.rewards) == expected
    assert read_prompt(raw, "rows.jsonl", 7).prompt == expected[0]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_of_the_one_format_that_is_asked_before_the_others_that_detect_it(name):
    own, raw, _ = ROWS[name]
    columns = {key: value for key, value in raw.items() if value is not None}
    detected = [format.name for format in FORMAT.classes.values() if format.detect(columns)]
    assert detected[0] == own
    assert all(comes_before(own, other) for other in detected[1:])


def comes_before(first: str, other: str) -> bool:
    later = FORMAT.classes[first].before
    return other in later or any(comes_before(name, other) for name in later)


PARTS = ("prompt", "messages", "question", "instruction", "input", "context", "conversations", "contents") + (
    *("history", "chosen", "rejected", "reject", "chosen_response", "rejected_response", "rejected_messages"),
    *("preferred_output", "preferred", "accepted"),
    *("response", "completion", "output", "response_j", "generations", "new_generations", "responses", "completions"),
    *("raw_generation_responses", "initial_reason_steps", "orig_response_A", "system", "system_instruction"),
)  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_what_is_added_to_a_row_is_read_or_named_or_refused(name):
    raw = ROWS[name][1]
    before = [line for text in texts_in([read(raw).prompt, read(raw).completions]) for line in text.splitlines()]
    for part in PARTS:
        for added in ("Zebras are striped.", ["Zebras are striped."], [user("Zebras are striped.")]):
            if part in raw:
                continue
            try:
                row = read({**raw, part: added})
            except (BadRow, UnusableRow) as error:
                assert str(error)
                continue
            used = [*texts_in([row.prompt, row.completions])]
            assert any("Zebras" in text for text in used) or part in row.meta, (part, added)
            everything = [*used, *texts_in(row.meta)]
            assert all(any(line in text for text in everything) for line in before), (part, added)


def test_tools_of_any_service_are_the_rows_tools():
    for name, tool in (
        ("openai, earlier turns, and a call of a tool", TOOL),
        ("gemini, an answer that calls a tool", {"type": "function", "function": {"name": "add"}}),
        (
            "nova, three candidates, as Parquet gives them back",
            {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
        ),
        ("sharegpt, sides of a list, with a system text and tools beside", TOOL),
    ):
        assert read(ROWS[name][1]).tools == [tool], name


OPENAI = {"input": {"messages": [user("q")]}, "preferred_output": [said("yes")], "non_preferred_output": [said("no")]}
GEMINI = {"contents": [{"role": "user", "parts": [{"text": "q"}]}]}
SCORED = {"score": 1, "completion": {"role": "model", "parts": [{"text": "yes"}]}}
SWIFT = {"messages": [user("q"), said("yes")], "rejected_response": "no"}
GENERATED = {"instruction": "q", "generations": ["yes", "no"], "ratings": [5, 1]}
JUDGED = {"orig_instruction": "q", "orig_response_A": "yes", "orig_response_B": "no", "orig_preference": "A"}
RECORD = {"fields": {"instruction": "q", "a": "yes", "b": "no"}, "responses": {"best": [{"value": "b"}]}}
STEP = {"prompt": "q", "initial_reason_steps": "Step 1: ", "chosen": "yes", "rejected": "no"}


def nova(*candidates):
    return {"messages": [user("q"), {"role": "assistant", "candidates": [*candidates]}]}


# the row, and the field at fault as the file calls it
REFUSED = [
    ({key: OPENAI[key] for key in ("input", "preferred_output")}, "non_preferred_output"),
    ({key: OPENAI[key] for key in ("preferred_output", "non_preferred_output")}, "input"),
    ({**OPENAI, "input": {"model": "gpt"}}, "input.messages"),
    ({**OPENAI, "input": {"messages": [{"role": "user"}]}}, "input.messages[0]"),
    ({**OPENAI, "input": {"messages": [{"role": "chief", "content": "q"}]}}, "input.messages[0].role"),
    ({**OPENAI, "input": {"messages": [user("q")], "tools": 5}}, "tools"),
    ({**OPENAI, "input": "What is it?"}, "input"),
    ({**OPENAI, "preferred_output": json.dumps([said("yes")])}, "preferred_output"),
    ({"prompt": "q", "completion": [user("r"), said("yes")], "label": True}, "completion"),
    ({**OPENAI, "preferred_output": 5}, "preferred_output"),
    ({**OPENAI, "preferred_output": []}, "preferred_output"),
    ({**OPENAI, "preferred_output": [user("yes")]}, "preferred_output"),
    ({**OPENAI, "preferred_output_2": "maybe"}, "preferred_output_2"),
    ({**OPENAI, "input": {"messages": [user("q")], "system": "Be kind."}}, "input[].system"),
    ({**GEMINI, "completions": [SCORED, {"completion": SCORED["completion"]}]}, "completions[1].score"),
    ({**GEMINI, "completions": [SCORED, {"score": 0}]}, "completions[1].completion"),
    ({**GEMINI, "completions": [SCORED, {**SCORED, "score": "high"}]}, "completions[1].score"),
    ({**GEMINI, "completions": ["yes", "no"]}, "completions"),
    ({"contents": [], "completions": [SCORED]}, "contents"),
    (GEMINI, "contents"),
    (nova({"content": [{"text": "yes"}], "preferenceLabel": "good"}), "messages[1].candidates[0].preferenceLabel"),
    (nova({"content": [{"text": "yes"}]}), "messages[1].candidates[0].preferenceLabel"),
    (nova({"preferenceLabel": "preferred"}), "messages[1].candidates[0].content"),
    (nova({"content": [{"image": {}}], "preferenceLabel": "preferred"}), "messages[1].candidates[0].content[0]"),
    (nova("yes", "no"), "messages[1].candidates"),
    ({"conversations": [{"from": "chief", "value": "q"}], "kto_tag": True}, "conversations[0].from"),
    ({"conversations": [human("q")], "chosen": gpt("yes")}, "rejected"),
    ({"conversations": [human("q")], "kto_tag": True}, "conversations"),
    ({"conversations": [human("q"), gpt("yes")], "kto_tag": "maybe"}, "kto_tag"),
    ({"conversations": [human("q")], "chosen": {"from": "gpt"}, "rejected": gpt("no")}, "chosen"),
    ({**SWIFT, "messages": [user("q")]}, "messages"),
    ({**SWIFT, "rejected_response": 5}, "rejected_response"),
    ({**SWIFT, "rejected_tools": [TOOL]}, "rejected_tools"),
    ({**SWIFT, "rejected_images": ["a.png"]}, "rejected_images"),
    ({**SWIFT, "rejected_messages": [said("never")]}, "rejected_messages"),
    ({"instruction": "q", "input": "", "output": ["a", "b", "c"]}, "output"),
    ({"instruction": "q", "input": "", "output": ["a", 5]}, "output[1]"),
    ({"instruction": "q", "input": "r", "output": 5}, "output"),
    ({**GENERATED, "ratings": [5]}, "ratings"),
    ({**GENERATED, "ratings": [5, "high"]}, "ratings[1]"),
    ({**GENERATED, "generations": ["yes", 5]}, "generations[1]"),
    ({**GENERATED, "new_generations": ["maybe"]}, "new_generations"),
    ({**JUDGED, "orig_preference": "C"}, "orig_preference"),
    ({**JUDGED, "orig_response_B": None}, "orig_response_B"),
    ({**RECORD, "responses": {"sure": [{"value": "yes"}]}}, "responses"),
    ({**RECORD, "responses": {"a-rating": [{"value": "good"}], "b-rating": [{"value": 1}]}}, "a-rating"),
    ({**RECORD, "fields": {"a": "yes", "b": "no"}}, "fields"),
    ({**RECORD, "fields": {**RECORD["fields"], "instruction": "Is it", "context": "At all."}}, "fields[].instruction"),
    ({**RECORD, "responses": 5}, "responses"),
    ({**RECORD, "responses": [{"values": 5}]}, "responses[0].values"),
    ({**RECORD, "suggestions": "b"}, "suggestions"),
    ({**RECORD, "fields": {**RECORD["fields"], "b": 5}}, "responses"),
    ({**STEP, "initial_reason_steps": 5}, "initial_reason_steps"),
    ({"instruction": 5, "chosen_response": "yes", "rejected_response": "no"}, "instruction"),
    ({"instruction": "q", "chosen_response": 5, "rejected_response": "no"}, "chosen_response"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "field"), REFUSED, ids=[f"{k} {field}" for k, (_, field) in enumerate(REFUSED)])
def test_a_malformed_row_is_refused_by_the_field_that_the_file_has(raw, field):
    with pytest.raises(BadRow) as error:
        read(raw)
    assert error.value.field == field and error.value.remedy


def test_what_else_was_asked_of_a_record_is_named():
    other = {"generations-0-rationale": {"value": "It is."}, "kind": {"value": "small talk"}}
    asked = {f"generations-{k}-rating": {"value": k} for k in range(2)}
    fields = {"instruction": "q", "generations-0": "no", "generations-1": "yes", "topic": "talk"}
    row = read({"fields": fields, "suggestions": {**asked, **other}})
    assert row.unread == ("fields[].topic", "responses[].generations-0-rationale", "responses[].kind")


@pytest.mark.parametrize(
    ("responses", "reason"),
    [({}, "an Argilla record without responses"), ({"a-rating": [{"value": 1}]}, "an Argilla record with one rated")],
)
def test_records_that_nobody_judged_are_counted(responses, reason):
    with pytest.raises(UnusableRow, match=reason):
        read({**RECORD, "responses": responses})


def test_conversations_of_a_list_with_different_prompts_are_counted():
    said_after = [[user("q"), said("b"), user(text), said("yes")] for text in ("r", "s")]
    assert read({"prompt": "q", "completions": said_after, "ranks": [1, 2]}).prompt == [user("q")]
    other = [[{**SYSTEM, "content": text}, user("q"), said("yes")] for text in ("Be kind.", "Be terse.")]
    with pytest.raises(UnusableRow, match="prompt mismatch between the completions"):
        read({"prompt": "q", "completions": other, "ranks": [1, 2]})


def test_generations_that_the_judge_did_not_rate_are_counted():
    with pytest.raises(UnusableRow, match="a generation without a rating"):
        read({**GENERATED, "ratings": [5, None]})


def read(raw):
    return read_row(deepcopy(raw), "rows.jsonl", 7)
