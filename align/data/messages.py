"""A conversation in any spelling becomes the one spelling that the rest of the code reads.

A message is `{"role", "content"}` with content a text, and where it has them `reasoning_content`, `tool_calls`
(`[{"id"?, "type": "function", "function": {"name", "arguments": object}}]`), `tool_call_id`, `name` and `weight`. Keys
of other names stay as they are: a chat template may read them.

Sources: the messages of OpenAI's Chat Completions (its older `function_call` too), Anthropic's Messages, Gemini's
`contents` and Bedrock's Converse; ShareGPT's `from` and `value`; ms-swift's roles `tool_call` and `tool_response`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from align.data.bad_row import BadRow, kind
from align.data.content import Parts, call_of, calls_in_text, parsed, read_content

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_NAMES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "chatbot", "bot"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response", "ipython"), "tool"),
}
CALL_ROLES = ("function_call", "tool_call")
"""Of a message whose text is the JSON of a call."""
CONTENTS = ("content", "value", "parts")
REASONINGS = ("reasoning_content", "reasoning", "thinking")
RESULT_IDS = ("tool_call_id", "tool_use_id")
MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))
WEIGHT_KEYS = ("weight", "loss", "loss_scale", "loss_weight", "loss_mask", "train", "training", "trainable")
OF_TOKENS = "training_detail"
"""axolotl's weights of parts of a message."""


def conversation(entries: Sequence[dict[str, Any]], where: str) -> list[Message]:
    """The messages of a conversation in the one spelling; what is spelled so already stays as it is.

    A message of several tool results becomes one message for each. A call in a message of its own joins the
    assistant's message before it. Entries of null and empty lists count as absent, which Parquet writes so.

    Args:
        entries: of any spelling.
        where: the field that holds them, for refusals.

    Raises:
        BadRow: an unknown role or part, media, arguments that are no object, or an order that the one spelling cannot
            keep.

    Source: ours
    """
    messages: list[Message] = []
    for k, entry in enumerate(entries):
        if entry.keys() == {"role", "content"} and entry["role"] in ROLES and type(entry["content"]) is str:
            messages.append(entry)
            continue
        own = {key: value for key, value in entry.items() if value is not None and value != [] and value != {}}
        called = _named_role(own) in CALL_ROLES
        if own.keys() <= {"role", "from"} and (null := next((key for key in CONTENTS if key in entry), None)):
            raise BadRow(f"{where}[{k}].{null}", "nothing is said there", "give text, or remove the row")
        found = _messages(own, f"{where}[{k}]")
        if called and messages and _joins(messages[-1], found[0]):
            calls = [*messages[-1].get("tool_calls", ()), *found[0]["tool_calls"]]
            messages[-1] = {**messages[-1], "tool_calls": calls}
        else:
            messages += found
    return messages


def _joins(before: Message, call: Message) -> bool:
    """Whether a call in a message of its own belongs to the message before it."""
    alone = call.keys() <= {"role", "content", "tool_calls", "weight"}
    return alone and before["role"] == "assistant" and before.get("weight") == call.get("weight")


def _named_role(own: Message) -> str:
    named = own.get("role", own.get("from"))
    role = named.lower() if isinstance(named, str) else ""
    return ROLE_NAMES.get(role, role)


def _messages(own: Message, where: str) -> list[Message]:
    """One message as the file has it, without nulls, as the messages that it stands for."""
    role, own = _take_role(own, where)
    parts = Parts()
    held = [own.pop(key) for key in CONTENTS if key in own]
    if role in CALL_ROLES:
        role, parts.calls = "assistant", calls_in_text(held[0] if held else None, where)
    elif held:
        read_content(held[0], f"{where}.content", parts, lenient=role == "tool")
    said = [own.pop("refusal")] if own.get("refusal") and role == "assistant" else []
    keys = {**_reasoning(own, parts, role, where), **_calls(own, parts, role, where)}
    if not (held or said or keys or role == "tool"):
        named = ", ".join(["role", *own])
        raise BadRow(where, f"a message with the keys {named}", "name them `role` and `content`")
    identity = next((own.pop(key) for key in RESULT_IDS if key in own and role == "tool"), None)
    keys |= {} if identity is None else {"tool_call_id": identity}
    keys |= _weight(own, role, where)
    if parts.turns:
        if keys:
            found = ", ".join(keys)
            raise BadRow(where, f"tool results beside {found}", "give each in a message of its own")
        return [{**own, **turn} for turn in parts.flushed(role)]
    return [{"role": role, "content": "".join([*parts.texts, *said]), **keys, **own}]


def _take_role(own: Message, where: str) -> tuple[str, Message]:
    """The role by its one name, and the message without it."""
    key = "role" if "role" in own else "from"
    if key not in own:
        raise BadRow(where, f"a message with the keys {', '.join(own) or 'none'}", "name them `role` and `content`")
    role = _named_role(own)
    if role not in ROLES and role not in CALL_ROLES:
        raise BadRow(f"{where}.{key}", f"unknown role {own[key]!r}", f"use one of {', '.join(ROLES)}")
    media = next((name for name in own if name in MEDIA), None)
    if media is not None:
        raise BadRow(f"{where}.{media}", "images, audio and video are not read", "remove the row")
    return role, {name: value for name, value in own.items() if name != key}


def _reasoning(own: Message, parts: Parts, role: str, where: str) -> Message:
    """What the assistant thought, under its one key."""
    if role != "assistant":
        return {}
    thoughts = {"content": "".join(parts.thoughts)} if parts.thoughts else {}
    for key in [key for key in REASONINGS if key in own]:
        inner = Parts()
        read_content(own.pop(key), f"{where}.{key}", inner)
        thoughts[key] = "".join([*inner.thoughts, *inner.texts])
    different = list(dict.fromkeys(filter(None, thoughts.values())))
    if len(different) > 1:
        *_, key = thoughts
        raise BadRow(f"{where}.{key}", f"another reasoning than `{next(iter(thoughts))}` has", "keep one of the two")
    return {"reasoning_content": different[0]} if different else {}


def _calls(own: Message, parts: Parts, role: str, where: str) -> Message:
    """The calls of tools, those among the content's parts first."""
    given = own.pop("tool_calls", [])
    given = parsed(given, f"{where}.tool_calls") if isinstance(given, str) else given
    if not isinstance(given, list):
        raise BadRow(f"{where}.tool_calls", f"{kind(given)}, not a list", "give one object for each call")
    calls = [call_of(entry, f"{where}.tool_calls[{k}]") for k, entry in enumerate(given)]
    if "function_call" in own:
        older = call_of(own.pop("function_call"), f"{where}.function_call")
        calls += [] if older["function"] in [call["function"] for call in calls] else [older]
    calls = [*parts.calls, *(call for call in calls if call not in parts.calls)]
    if calls and role != "assistant":
        raise BadRow(where, f"a tool call of the {role}'s", "only the assistant calls tools; mend or remove the row")
    return {"tool_calls": calls} if calls else {}


def _weight(own: Message, role: str, where: str) -> Message:
    """How much an assistant's message counts, where that is not 1."""
    if OF_TOKENS in own:
        raise BadRow(f"{where}.{OF_TOKENS}", "weights of parts of a message", "give the message one `weight`")
    given = {key: own.pop(key) for key in WEIGHT_KEYS if key in own}
    for key, value in given.items():
        if not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise BadRow(f"{where}.{key}", "not a weight of a message", "give a number, 0 or larger")
        if role != "assistant" and value not in (0, 1):
            raise BadRow(f"{where}.{key}", f"a weight of the {role}'s message", "only the assistant's are learnt")
    if len({float(value) for value in given.values()}) > 1:
        raise BadRow(f"{where}.{[*given][-1]}", f"another weight than `{[*given][0]}` has", "keep one of the two")
    weight = float(next(iter(given.values()), 1.0))
    return {"weight": weight} if weight != 1 and role == "assistant" else {}
