"""Rows whose conversations are spelled as ShareGPT's."""

from typing import Any

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.reading import find_format
from align.data.formats.respelled import as_answer, as_conversation, read_as_general
from align.data.messages import ROLE_NAMES
from align.data.parts import has_prompt
from align.data.schema import is_messages

CONVERSATIONS = ("conversations", "conversation")
SPELLED = frozenset(
    ("prompt", "messages", "context", "chosen", "rejected", "completion", "response", "rejected_messages")
)
ASKED, ANSWERED = ("human", "user", "input"), ("assistant", "gpt", "bot", "output")
"""What the two halves of a turn are called where one object holds both."""


@FORMAT.add
class ShareGPT(Format):
    """Conversations of `from` and `value`, or of roles such as `human` and `gpt`: a pair's prompt and its sides (an
    object or several), whole sides, or a conversation that ends with the answer; also turns of question and answer.

    Source: LLaMA-Factory's data/README.md (sharegpt), ms-swift's Custom-dataset.md, axolotl's chat_template
    """

    name = "sharegpt"
    shape = "{conversations: [{from, value}], chosen, rejected}"
    published = "ShareGPT, LLaMA-Factory, axolotl, ms-swift"
    before = (
        "conversation",
        "preference",
        "items",
        "swift_pair",
        "alpaca",
        "distilabel",
        "distilabel_pair",
        "whole_completion",
    )

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        if not columns.keys().isdisjoint(CONVERSATIONS) and _main(columns) is not None:
            return True
        return any(_is_spelled(columns[name]) for name in columns.keys() & SPELLED)

    @classmethod
    def holds_answers(cls, columns: Columns) -> bool:
        respelled = dict(columns)
        _respell(respelled)
        return find_format(respelled).holds_answers(respelled)

    @staticmethod
    def read(columns: Columns) -> Columns:
        return read_as_general(columns, _respell(columns))


def _respell(columns: Columns) -> dict[str, str]:
    """Put the columns into the one spelling; what the file calls those that got another name."""
    main = _main(columns)
    own = {} if main is None else {"messages": main}
    if main is not None:
        columns["messages"] = as_conversation(_turns(columns.pop(main)), main)
    for name in columns.keys() & SPELLED:
        if _is_spelled(columns[name]):
            columns[name] = as_answer(columns[name], name)
    return own


def _main(columns: Columns) -> str | None:
    """The column of the conversation, where no other holds a prompt."""
    name = next((name for name in CONVERSATIONS if is_messages(columns.get(name))), None)
    return None if name is None or has_prompt(columns) else name


def _is_spelled(value: object) -> bool:
    """Whether it is messages, or one, in another spelling than with the general roles."""
    if isinstance(value, str):
        return False
    entries = [value] if isinstance(value, dict) else value
    return is_messages(entries) and any(
        ("from" in own and "role" not in own) or str(own.get("role")).lower() in ROLE_NAMES
        for own in entries  # type: ignore[attr-defined]
    )


def _turns(entries: list[Any]) -> list[Any]:
    """Messages of turns that hold a question and its answer each."""
    if any(own.keys() & {"from", "role"} for own in entries):
        return entries
    halves = [
        (role, next((name for name in names if name in own), None))
        for own in entries
        for role, names in (("user", ASKED), ("assistant", ANSWERED))
    ]
    return (
        entries
        if any(name is None for _, name in halves)
        else [{"role": role, "content": entries[k // 2][name]} for k, (role, name) in enumerate(halves)]
    )
