"""What a message's content holds, part by part: texts, thoughts, calls of tools and their results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.bad_row import BadRow, kind
from align.data.strict_json import loads, what_is_wrong

Object = dict[str, Any]

TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THOUGHTS = {"thinking": "thinking", "reasoning": "text"}
"""Type of a part -> the key that holds it."""
MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "document")
ARGUMENTS = ("arguments", "input", "args", "parameters")
WRAPPED = {
    **dict.fromkeys(("functionCall", "function_call", "toolUse"), "tool_use"),
    **dict.fromkeys(("functionResponse", "function_response", "toolResult"), "tool_result"),
}
"""Gemini's and Bedrock's parts: an object under the name of what it is -> Anthropic's `type`."""
IDS = ("id", "toolUseId")
RESULT_IDS = ("tool_use_id", "toolUseId", "id")
RESULTS = ("content", "response")


@dataclass
class Parts:
    """What the parts of one message's content hold."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Object] = field(default_factory=list)
    turns: list[Object] = field(default_factory=list)
    """Messages of tool results, and of the text before each."""

    def flushed(self, role: str) -> list[Object]:
        """The turns, and the text behind the last of them."""
        if any(self.texts):
            self.turns.append({"role": role, "content": "".join(self.texts)})
            self.texts = []
        return self.turns


def read_content(value: object, where: str, parts: Parts, *, lenient: bool = False) -> None:
    """Add a content, a text or a list of parts, to what was read.

    Args:
        where: the field, for refusals.
        lenient: whether anything else is a tool's result, which is written as JSON.

    Raises:
        BadRow: a part that is none of these, or behind one that the one spelling puts after it.

    Source: ours
    """
    if isinstance(value, str):
        parts.texts.append(value)
        return
    entries = value if isinstance(value, list) else [value]
    if lenient and not (isinstance(value, list) and all(map(_is_part, value))):
        parts.texts.append(json.dumps(without_nulls(value), ensure_ascii=False, default=str))
        return
    for k, entry in enumerate(entries):
        _read_part(entry, f"{where}[{k}]" if isinstance(value, list) else where, parts)


def call_of(entry: object, where: str) -> Object:
    """One call of a tool in OpenAI's spelling, its arguments as an object.

    Raises:
        BadRow: no function's name, or arguments that are no object.

    Source: ours
    """
    entry = parsed(entry, where) if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise BadRow(where, f"{kind(entry)}, not a tool call", "give an object with `name` and `arguments`")
    own: Object = entry["function"] if isinstance(entry.get("function"), dict) else entry
    name = own.get("name")
    if not isinstance(name, str) or not name:
        found = ", ".join(own) or "none"
        raise BadRow(where, f"a tool call without a function's name (keys: {found})", "give `name` and `arguments`")
    given: Any = next((own[key] for key in ARGUMENTS if own.get(key) is not None), {})
    arguments = (parsed(given, where) if given.strip() else {}) if isinstance(given, str) else without_nulls(given)
    if not isinstance(arguments, dict):
        raise BadRow(where, f"the arguments are {kind(arguments)}", "give an object of arguments by name, or its JSON")
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    identity = next((entry[key] for key in IDS if entry.get(key)), None)
    return call if identity is None else {"id": identity, **call}


def calls_in_text(value: object, where: str) -> list[Object]:
    """The calls of a message that holds nothing else: the JSON of one or of a list of them."""
    found = parsed(value, where) if isinstance(value, str) else value
    return [call_of(entry, where) for entry in (found if isinstance(found, list) else [found])]


def parsed(text: str, where: str) -> Any:
    """A text's JSON.

    Raises:
        BadRow: it is none.
    """
    try:
        return loads(text)
    except ValueError as error:
        raise BadRow(where, f"no JSON ({what_is_wrong(error)})", "mend it, or remove the row") from None


def without_nulls(value: Any) -> Any:
    """An object without entries of null, however deep, which Parquet writes for the absent ones."""
    if isinstance(value, dict):
        return {key: without_nulls(own) for key, own in value.items() if own is not None}
    return [without_nulls(own) for own in value] if isinstance(value, list | tuple) else value


def _is_part(entry: object) -> bool:
    """Whether a tool's result is a part and no data: of a known type, or media, which is refused by its name."""
    own = without_nulls(entry) if isinstance(entry, dict) else {}
    return own.get("type") in MEDIA or own.keys() == {"text"} or bool(own.keys() & {"type", *WRAPPED} and _type_of(own))


def _type_of(part: Object) -> str:
    """The type of a part; empty where it has none that is known."""
    if any(isinstance(part.get(name), dict) for name in WRAPPED):
        return "wrapped"
    named = part.get("type") or ("thinking" if part.get("thought") is True else "text")
    if named in ("tool_use", "tool_result"):
        return str(named)
    held = {**TEXTS, **THOUGHTS}.get(named)
    return str(named) if held and isinstance(part.get(held, part.get("text")), str | list) else ""


def _read_part(entry: object, where: str, parts: Parts) -> None:
    part: Object = {"type": "text", "text": entry}
    if not isinstance(entry, str):
        part = {key: own for key, own in entry.items() if own is not None} if isinstance(entry, dict) else {}
    named = _type_of(part)
    if named == "wrapped":
        wrapped = next(name for name in WRAPPED if isinstance(part.get(name), dict))
        part, named = part[wrapped], WRAPPED[wrapped]
    if named == "tool_result":
        parts.turns = [*parts.flushed("user"), _result(part, where)]
    elif named == "tool_use":
        parts.calls.append(call_of(part, where))
    elif named in TEXTS:
        _add(parts.texts, part[TEXTS[named]], parts.calls, where, "text behind a tool call")
    elif named in THOUGHTS:
        held = part.get(THOUGHTS[named], part.get("text"))
        said = [text for text in parts.texts if text.strip()]
        _add(parts.thoughts, _inner(held, where), [*said, *parts.calls], where, "reasoning behind text or a tool call")
    else:
        shown = f"a part of type {part['type']!r}" if part.get("type") else kind(entry)
        remedy = "only text, reasoning, tool calls and their results are read; give text, or remove the row"
        raise BadRow(where, f"{shown}, not text", remedy)


def _add(to: list[str], text: Any, behind: Sequence[object], where: str, problem: str) -> None:
    if not isinstance(text, str):
        raise BadRow(where, f"{kind(text)}, not text", "give text")
    if text and behind:
        remedy = "put it before them, or into a message of its own behind what they led to"
        raise BadRow(where, f"{problem}, where no chat template can write it", remedy)
    to.append(text)


def _inner(held: Any, where: str) -> Any:
    """The text of a thought that is itself a list of parts, as Mistral writes it."""
    if not isinstance(held, list):
        return held
    inner = Parts()
    read_content(held, where, inner)
    return "".join(inner.texts)


def _result(part: Object, where: str) -> Object:
    """A tool's result as a message of its own."""
    inner = Parts()
    held = next((part[key] for key in RESULTS if part.get(key) is not None), "")
    read_content(held, where, inner, lenient=True)
    if inner.calls or inner.turns or inner.thoughts:
        raise BadRow(where, "a tool call within a tool's result", "give text")
    identity = next((part[key] for key in RESULT_IDS if part.get(key)), None)
    message: Object = {"role": "tool", "content": "".join(inner.texts)}
    message |= {} if identity is None else {"tool_call_id": identity}
    return message | ({"name": part["name"]} if part.get("name") else {})
