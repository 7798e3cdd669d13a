"""Conversations in the one spelling, drawn at random, and every spelling that others have for them."""

import json
from copy import deepcopy
from itertools import groupby

import datasets

NAMES = ("get_weather", "search", "add")
TEXTS = ("It is warm.", "  two\nlines ", 'a "quoted" word', "é 東京", "<b>", "")


def arguments_of(draw):
    found = {"city": "Paris", "days": 3, "deep": {"on": True, "list": [1, 2]}, "quote": 'say "no"\n'}
    return {key: found[key] for key in found if draw.random() < 0.5}


def call_of(draw, number):
    function = {"name": draw.choice(NAMES), "arguments": arguments_of(draw)}
    return {"id": f"call{number}", "type": "function", "function": function}


def turns_of(draw, start):
    """A user's question, calls with their results, and perhaps the answer."""
    turns = [{"role": "user", "content": draw.choice(TEXTS[:-1])}]
    number = start
    for _ in range(draw.randrange(3)):
        calls = [call_of(draw, number + k) for k in range(draw.randrange(1, 3))]
        number += len(calls)
        turn = {"role": "assistant", "content": draw.choice(TEXTS)}
        if draw.random() < 0.5:
            turn["reasoning_content"] = draw.choice(TEXTS[:-1])
        turns.append({**turn, "tool_calls": calls})
        turns += [{"role": "tool", "content": draw.choice(TEXTS), "tool_call_id": call["id"]} for call in calls]
    answer = {"role": "assistant", "content": draw.choice(TEXTS[:-1])}
    return [*turns, {**answer, "reasoning_content": "so"} if draw.random() < 0.5 else answer]


def conversation_of(draw):
    """Messages in the one spelling."""
    system = [{"role": draw.choice(("system", "developer")), "content": "Be brief."}] * draw.randrange(2)
    turns = [turn for k in range(draw.randrange(1, 4)) for turn in turns_of(draw, 10 * k)]
    return [*system, *turns]


def openai(messages):
    spelled = deepcopy(messages)
    for message in spelled:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if "tool_calls" in message and not message["content"]:
            message["content"] = None
    return spelled


def openai_answer(messages):
    """With the keys that the service's answers have beside."""
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    return [{**message, **(empty if message["role"] == "assistant" else {})} for message in openai(messages)]


def text_parts(messages):
    """Every content as parts, a text cut in two."""
    spelled = deepcopy(messages)
    for message in spelled:
        text = message["content"]
        message["content"] = [{"type": "text", "text": part} for part in (text[:3], text[3:])]
    return spelled


def parquet(messages):
    """As they come back from Arrow, where every object has every key."""
    return datasets.Dataset.from_list([{"messages": messages}])[0]["messages"]


def anthropic(messages):
    """Blocks; the results of all calls of a turn in one user's message, with what the user says next."""
    spelled = []
    for message in messages:
        text = [{"type": "text", "text": message["content"]}] if message["content"] else []
        if message["role"] == "tool":
            result = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": text}
            spelled.append({"role": "user", "content": [result]})
            continue
        thought = message.get("reasoning_content")
        before = [{"type": "thinking", "thinking": thought, "signature": "x"}] if thought else []
        calls = [
            {
                "type": "tool_use",
                "id": call["id"],
                "name": call["function"]["name"],
                "input": call["function"]["arguments"],
            }
            for call in message.get("tool_calls", ())
        ]
        spelled.append({"role": message["role"], "content": before + text + calls or message["content"]})
    merged = []
    for is_user, run in groupby(spelled, key=lambda message: message["role"] == "user"):
        own = list(run)
        blocks = [block for message in own for block in message["content"]]
        merged += [{"role": "user", "content": blocks}] if is_user else own
    return merged


def gemini(messages):
    roles = {"assistant": "model", "tool": "function"}
    spelled = []
    for message in messages:
        parts = [{"text": message["reasoning_content"], "thought": True}] if message.get("reasoning_content") else []
        if message["role"] == "tool":
            response = {"id": message["tool_call_id"], "response": [{"type": "text", "text": message["content"]}]}
            parts.append({"functionResponse": response})
        else:
            parts.append({"text": message["content"]})
        for call in message.get("tool_calls", ()):
            own = {"id": call["id"], "name": call["function"]["name"], "args": call["function"]["arguments"]}
            parts.append({"functionCall": own})
        spelled.append({"role": roles.get(message["role"], message["role"]), "parts": parts})
    return spelled


def bedrock(messages):
    spelled = []
    for message in messages:
        parts = [{"text": message["content"]}]
        if message["role"] == "tool":
            parts = [{"toolResult": {"toolUseId": message["tool_call_id"], "content": parts, "status": "success"}}]
        for call in message.get("tool_calls", ()):
            own = {"toolUseId": call["id"], "name": call["function"]["name"], "input": call["function"]["arguments"]}
            parts.append({"toolUse": own})
        role = "user" if message["role"] == "tool" else message["role"]
        thought = {key: message[key] for key in ("reasoning_content",) if key in message}
        spelled.append({"role": role, "content": parts, **thought})
    return spelled


def older_openai(messages):
    """One call at most in a message, and results by the function's name."""
    spelled, name = [], None
    for message in openai(messages):
        calls = message.pop("tool_calls", [])
        if calls:
            name = calls[0]["function"]["name"]
            message["function_call"] = calls[0]["function"]
        if message["role"] == "tool":
            message = {"role": "function", "name": name, "content": message["content"]}
        spelled.append(message)
    return spelled


def in_messages_of_their_own(keys, roles, call_role):
    """ShareGPT's and ms-swift's spelling: each call is a message."""

    def spell(messages):
        spelled = []
        for message in messages:
            own = dict(zip(keys, (roles.get(message["role"], message["role"]), message["content"]), strict=True))
            if "reasoning_content" in message:
                own["reasoning_content"] = message["reasoning_content"]
            spelled.append(own)
            for call in message.get("tool_calls", ()):
                spelled.append(dict(zip(keys, (call_role, json.dumps(call["function"])), strict=True)))
        return spelled

    return spell


def under(key):
    """What is thought, under another name."""

    def spell(messages):
        return [{key if name == "reasoning_content" else name: own[name] for name in own} for own in messages]

    return spell


def without_ids(messages):
    """What a spelling can say that has no ids of calls."""
    spelled = [{key: own[key] for key in own if key != "tool_call_id"} for own in deepcopy(messages)]
    for message in spelled:
        for call in message.get("tool_calls", ()):
            call.pop("id")
    return spelled


def as_it_is(messages):
    return messages


SPELLINGS = {
    "the one spelling": (as_it_is, as_it_is),
    "openai": (openai, as_it_is),
    "openai's answers": (openai_answer, as_it_is),
    "text parts": (text_parts, as_it_is),
    "parquet": (parquet, as_it_is),
    "parquet of anthropic": (lambda messages: parquet(anthropic(messages)), as_it_is),
    "anthropic": (anthropic, as_it_is),
    "gemini": (gemini, as_it_is),
    "bedrock": (bedrock, as_it_is),
    "sharegpt": (
        in_messages_of_their_own(
            ("from", "value"), {"user": "human", "assistant": "gpt", "tool": "observation"}, "function_call"
        ),
        without_ids,
    ),
    "ms-swift": (
        in_messages_of_their_own(("role", "content"), {"tool": "tool_response"}, "tool_call"),
        without_ids,
    ),
    "reasoning": (under("reasoning"), as_it_is),
    "thinking": (under("thinking"), as_it_is),
}
"""Name -> how it is spelled, and what of a conversation it can say."""
