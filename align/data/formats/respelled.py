"""Rows that are a general format in other words: their columns get its names, and messages keep the file's."""

import re

from align.data.columns import Columns
from align.data.formats.reading import find_format
from align.data.messages import Message, conversation
from align.data.parts import prompt_name
from align.data.schema import JSON_MESSAGES, BadRow, is_messages


def read_as_general(columns: Columns, own: dict[str, str]) -> Columns:
    """What the format of respelled columns reads of them.

    Args:
        columns: by the general names.
        own: general name -> what the file calls it.

    Raises:
        BadRow: as the format's, about the file's columns.
        UnusableRow: as the format's.
    """
    prompt = prompt_name(columns) or "prompt"
    try:
        format = find_format(columns)
        parts = format.read(columns)
    except BadRow as error:
        raise BadRow(_renamed(error.field or "", own) or None, error.problem, error.remedy) from None
    names = {"prompt": f"{prompt}[{{}}]", **parts["names"]}
    parts["names"] = {part: _in_own_words(called, own) for part, called in names.items()}
    kept = {name: columns.pop(name) for name in format.keeps if name in columns}
    return {**parts, "kept": kept | parts.get("kept", {})}


def as_answer(value: object, where: str) -> list[Message]:
    """An answer as messages; a text is the assistant's.

    Raises:
        BadRow: neither text nor messages.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": _plain(value, where)}]
    if isinstance(value, dict):
        try:
            return conversation([value], where)
        except BadRow as error:  # there is no list, and so no place in it
            raise BadRow((error.field or "").replace(f"{where}[0]", where, 1), error.problem, error.remedy) from None
    if not is_messages(value):
        raise BadRow(where, "neither text nor messages", "give the assistant's answer, or remove the row")
    return conversation(value, where)  # type: ignore[arg-type]


def as_conversation(value: object, where: str) -> list[Message]:
    """A conversation in the one spelling; a text is the user's.

    Raises:
        BadRow: neither text nor messages.
    """
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": _plain(value, where)}]
    if not is_messages(value):
        raise BadRow(where, "not a list of messages", "give a list of objects with `role` and `content`")
    return conversation(value, where)  # type: ignore[arg-type]


def _plain(text: str, where: str) -> str:
    if JSON_MESSAGES.match(text):
        raise BadRow(where, "a conversation written as text", "give it as a list of messages, not as its JSON")
    return text


def _in_own_words(called: str | tuple[str, ...], own: dict[str, str]) -> str | tuple[str, ...]:
    if isinstance(called, str):
        return _renamed(called, own)
    return tuple(_renamed(name, own) for name in called)


def _renamed(field: str, own: dict[str, str]) -> str:
    """A field under its file's name: `messages[2].content` is `conversations[2].content` in one."""
    start = re.match(r"\w*", field)[0]  # type: ignore[index]
    return own.get(start, start) + field[len(start) :]
