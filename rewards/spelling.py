"""How a chat template wants messages spelled: some read a call's arguments as text, some know no developer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from rewards.rendering import OutOfBounds, Unrendered, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, Any]]

REASONING = "reasoning_content"
"""The one key of what the assistant thought."""
KEYS = (REASONING, "thinking", "reasoning")
"""Those that templates read, the usual one first."""
NAME, KEY, VALUE = "probe_name", "probe_key", "probe_value"
THOUGHT, ORDER = "a probe of a thought", "a probe of an order"
PROBE_ID = "a1b2c3d4e"
"""Of the length that Mistral's templates ask for."""


@dataclass(frozen=True)
class Spelling:
    """What a template is given in the place of our own spelling."""

    as_text: bool = False
    """Arguments of calls as JSON text."""
    null: bool = False
    """A content of null beside calls, where there is no text."""
    reasoning: str = REASONING
    """The key of what was thought."""
    system: bool = False
    """A developer's message as the system's, whose role alone is known."""

    def spell(self, conversation: Conversation) -> Conversation:
        """The conversation as the template wants it; the same object where there is nothing to change."""
        if self == Spelling():
            return conversation
        return [self._message(own) if _is_respelled(own) else own for own in conversation]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        spelled = dict(message)
        if self.as_text and "tool_calls" in message:
            spelled["tool_calls"] = with_text_arguments(message["tool_calls"])
        if self.null and "tool_calls" in message and not message["content"]:
            spelled["content"] = None
        if self.system and message["role"] == "developer":
            spelled["role"] = "system"
        if self.reasoning not in message and REASONING in message:
            spelled[self.reasoning] = spelled.pop(REASONING)
        return spelled


_known: dict[tuple[str, str], Spelling] = {}
"""Template and special tokens -> spelling."""


def spelled(
    conversation: Conversation,
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> Conversation:
    """A conversation as the chat template wants it.

    Args:
        conversation: in our own spelling.
        tokenizer: whose template it is, unless `chat_template` is given.
        chat_template: Jinja text.
        tools: a tokenizer may have another template for conversations with tools.

    Returns:
        The messages; those that hold neither calls nor reasoning, and are not a developer's, as they are.

    Source: ours
    """
    if not any(map(_is_respelled, conversation)):
        return conversation
    template = str(tokenizer.get_chat_template(chat_template, tools))
    key = template, repr(tokenizer.special_tokens_map)
    if key not in _known:
        _known[key] = _probed(lambda messages: _render(messages, tokenizer, template))
    return _known[key].spell(conversation)


def _is_respelled(message: dict[str, Any]) -> bool:
    return "tool_calls" in message or REASONING in message or message["role"] == "developer"


def with_text_arguments(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls with their arguments as JSON text, as OpenAI's API has them."""
    return [
        {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
        for call in calls
        for function in [call["function"]]
    ]


def message_text(message: dict[str, Any]) -> str:
    """What a message says as plain text: its content, then its calls as JSON, each on a line of its own."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    content = [message["content"]] if message["content"] or not calls else []
    return "\n".join([*content, *calls])


def _render(messages: Conversation, tokenizer: "PreTrainedTokenizerBase", template: str) -> str:
    try:
        return rendered(tokenizer, messages, chat_template=template, tools=[_tool()])
    except OutOfBounds:
        raise
    except Unrendered:  # whatever a template raises, it does not take this spelling
        return ""


def _probed(render: Callable[[Conversation], str]) -> Spelling:
    """The first spelling whose call is written as JSON or piece by piece, and the first key whose thought is."""
    ways = [Spelling(as_text=as_text, null=null) for as_text, null in product((False, True), repeat=2)]
    calling = next((way for way in ways if _writes_call(render(way.spell(_call_probe())))), Spelling())
    talk = calling.spell(_call_probe())
    probes = (talk[:1] + talk[-1:], talk[:2])  # some write it beside calls alone
    thought = next((key for key in KEYS if any(THOUGHT in render(_thinking(own, key)) for own in probes)), REASONING)
    told = [ORDER in render([{"role": role, "content": ORDER}, talk[0]]) for role in ("developer", "system")]
    return Spelling(calling.as_text, calling.null, thought, told == [False, True])


def _writes_call(rendered: str) -> bool:
    """Whether name, argument and value are there, as neither Python's own writing nor JSON in JSON."""
    written = all(part in rendered for part in (NAME, KEY, VALUE))
    return written and f"'{KEY}'" not in rendered and f'\\"{KEY}' not in rendered


def _tool() -> dict[str, Any]:
    schema = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": "other", "description": "None.", "parameters": schema}}


def _call_probe() -> Conversation:
    call = {"id": PROBE_ID, "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
    return [
        {"role": "user", "content": "Ask."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Result.", "tool_call_id": PROBE_ID, "name": NAME},
        {"role": "assistant", "content": "Answer."},
    ]


def _thinking(conversation: Conversation, key: str) -> Conversation:
    """A conversation whose last message has a thought."""
    return [*conversation[:-1], {**conversation[-1], key: THOUGHT}]
