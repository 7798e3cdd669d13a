"""Rows that are conversations."""

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.parts import parts_of, single_grade
from align.data.schema import BadRow, is_messages
from align.data.splitting import split_messages


@FORMAT.add
class Conversation(Format):
    """A conversation that ends with the completion, with a `label` (true is good), a score, or neither."""

    name = "conversation"
    shape = "{messages, label}"
    needs = ("messages",)

    @classmethod
    def holds_answers(cls, columns: Columns) -> bool:
        return ends_with_answer(columns)

    @staticmethod
    def read(columns: Columns) -> Columns:
        messages = columns.pop("messages")
        if not is_messages(messages):
            raise BadRow("messages", "not a list of messages", "give a list of objects with `role` and `content`")
        if messages[-1].get("role") != "assistant":
            raise BadRow("messages", "the last message is not the assistant's", "end with the completion to learn from")
        prompt, completion = split_messages(messages, "messages")
        return parts_of(prompt, [completion], ("messages",), **single_grade(columns))


def ends_with_answer(columns: Columns) -> bool:
    """Whether a row's `messages` end with one of the assistant's."""
    messages = columns.get("messages")
    return is_messages(messages) and messages[-1].get("role") == "assistant"  # type: ignore[index]
