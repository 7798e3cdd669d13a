"""What a chat template must not drop: tools, their calls and results, who speaks, and all that an answer holds."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Conversation = list[dict[str, Any]]

REMEDY = "set `policy.chat_template` to one that writes {}"
OF_SCORER = "score with a model whose chat template writes {}"
IGNORE = (
    ", or leave it out of the column that has the message, as of `chosen` with 'data.ignore=[\"chosen[].{0}\"]' "
    "(without a recipe --ignore 'chosen[].{0}')"
)
"""Of a key of the messages in a column."""


class Dropped(ValueError):
    """What the template drops, and of which message; `remedy` says what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"the chat template drops {what}")
        self.remedy = remedy


def refuse_lost(
    conversation: Conversation, lost: Sequence[tuple[int, str]], answers: Collection[int], remedy: str = REMEDY
) -> None:
    """Refuse what is lost of a conversation, unless a template may well leave it out.

    That is reasoning of earlier turns, which models do not read again, and a key that only some template knows.

    Args:
        conversation: in the one spelling.
        lost: place and key, as `left_out` finds them.
        answers: places of the messages that are learnt or judged.
        remedy: what helps; {} stands for what is dropped.

    Raises:
        Dropped: a tool call or result, a name, or something of an answer.

    Source: ours
    """
    it = remedy.format("it")
    for place, key in lost:
        role = conversation[place]["role"]
        of = f"of message {place + 1} ({role})"
        if key == "tool_calls":
            raise Dropped(f"the tool calls {of}", remedy.format("them"))
        if (role, key) == ("tool", "content"):
            raise Dropped(f"the tool's result {of}", it)
        if key == "name":
            raise Dropped(f"the `name` {of}", it + IGNORE.format(key))
        if place in answers and role == "assistant" and key == "reasoning_content":
            raise Dropped(f"the reasoning (`{key}`) {of}", it + IGNORE.format(key))
        if place in answers and role == "assistant" and key == "content":
            raise Dropped(f"a part of the content {of}", it)


def refuse_lost_tools(
    options: Mapping[str, Any], before: Callable[[Mapping[str, Any]], str], remedy: str = REMEDY
) -> None:
    """Refuse a template that writes the same, or no more of a tool's name, with the tools as without them.

    Args:
        options: what the template is given, with `tools` where there are any.
        before: renders the prompt with such options.
        remedy: what helps; {} stands for what is dropped.

    Raises:
        Dropped: a tool's name is not written.

    Source: ours
    """
    tools = options.get("tools")
    if not tools:
        return
    with_tools, without = before(options), before({**options, "tools": None})
    names = [tool["function"]["name"] for tool in tools]
    missing = [name for name in names if with_tools.count(name) <= without.count(name)]
    if missing:
        what = "the row's tools" if len(missing) == len(names) else f"the tool `{missing[0]}`"
        ignore = ", or leave them out with data.ignore=[tools] (without a recipe --ignore tools)"
        raise Dropped(what, remedy.format("them") + ignore)
