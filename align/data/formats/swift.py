"""Rows that ms-swift takes: the chosen side is a conversation, the rejected one stands beside it."""

from typing import Any

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.respelled import as_conversation, read_as_general
from align.data.messages import Message
from align.data.parts import parts_of
from align.data.schema import BadRow

REJECTED = ("rejected_response", "rejected_messages")
OTHER_SIDES = ("chosen", "rejected", "chosen_response")
ASKING = ("user", "tool")
"""Who speaks last before the answer."""


@FORMAT.add
class SwiftPair(Format):
    """A conversation that ends with the chosen answer, beside the rejected one as `rejected_response` (a text, or
    several) or the whole rejected conversation; the older rows have `query` and `response` instead.

    Source: ms-swift's Custom-dataset.md and template_inputs.py, where the rejected response follows the last message of
    the user's or a tool's
    """

    name = "swift_pair"
    shape = "{messages, rejected_response | rejected_messages}"
    published = "ms-swift"
    any_of = REJECTED
    before = ("completion", "alpaca")

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        names = columns.keys()
        if names.isdisjoint(REJECTED) or not names.isdisjoint(OTHER_SIDES):
            return False
        return "messages" in columns or "response" in columns

    @staticmethod
    def read(columns: Columns) -> Columns:
        if "messages" not in columns:
            columns["chosen"], columns["rejected"] = columns.pop("response"), columns.pop(_rejected(columns))
            return read_as_general(columns, {"chosen": "response", "rejected": "rejected_response"})
        chosen = as_conversation(columns.pop("messages"), "messages")
        name = _rejected(columns)
        rejected = columns.pop(name)
        asked = next((k + 1 for k in reversed(range(len(chosen))) if chosen[k]["role"] in ASKING), 0)
        if asked == len(chosen):
            raise BadRow("messages", "the last message is not the assistant's", "end with the chosen answer")
        sides = _sides(rejected, chosen[:asked], name)
        if len(sides) == 1:
            columns["chosen"], columns["rejected"] = chosen, sides[0]
            return read_as_general(columns, {"chosen": "messages", "rejected": name})
        answers = [chosen[asked:], *(side[asked:] for side in sides)]
        names = ("messages", *(f"{name}[{k}]" for k in range(len(sides))))
        grades = [1.0] + [0.0] * len(sides)
        return parts_of(chosen[:asked], answers, names, grades=grades, prompt_called="messages[{}]")


def _rejected(columns: Columns) -> str:
    return next(name for name in REJECTED if name in columns)


def _sides(rejected: Any, asked: list[Message], name: str) -> list[list[Message]]:
    """The whole rejected conversations: an answer alone follows what the chosen one follows."""
    texts = [rejected] if isinstance(rejected, str) else rejected
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return [[*asked, {"role": "assistant", "content": text}] for text in texts]
    messages = as_conversation([rejected] if isinstance(rejected, dict) else rejected, name)
    return [messages if messages[0]["role"] != "assistant" else [*asked, *messages]]
