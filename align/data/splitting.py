"""Where the prompt of a whole conversation ends and what is learnt of it begins."""

from collections.abc import Sequence
from typing import Any

from align.data.messages import WEIGHT_KEYS, Message, conversation
from align.data.schema import BadRow, Row, UnusableRow, changed, is_messages

MISMATCH = "prompt mismatch between chosen and rejected"
OPEN = ("assistant", "tool")
"""Roles of a prompt's last message behind which a completion may begin with another role than the assistant's."""


def split_conversations(conversations: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """The messages that all conversations begin with, and what each goes on with: one of the assistant's at least.

    Raises:
        UnusableRow: they share no message, or part at a question and not at an answer to one.
    """
    most = min(_last_answer(own) for own in conversations)
    bare = [[_bare(message) for message in own[:most]] for own in conversations]
    shared = next((i for i in range(most) if any(own[i] != bare[0][i] for own in bare)), most)
    prompt = [_bare(message) for message in conversations[0][:shared]]
    rests = [list(own[shared:]) for own in conversations]
    if not prompt or any(not _fits(prompt, rest) for rest in rests):
        raise UnusableRow(MISMATCH)
    return prompt, rests


def are_whole(prompt: object, conversations: Sequence[Any]) -> bool:
    """Whether completions beside a prompt are conversations that hold it, rather than what follows it."""
    if not all(is_messages(own) and len(own) > 1 for own in conversations):
        return False
    if is_messages(prompt):
        first, last = _bare(prompt[0]), _role(prompt[-1])  # type: ignore[index]
        if all(_bare(own[0]) == first for own in conversations):
            return True
        open_end = last in OPEN
    else:
        if all(prompt == _first_question(own) for own in conversations):
            return True
        open_end = False
    return not open_end and not all(_role(own[0]) in OPEN for own in conversations)


def agrees(given: object, prompt: list[Message], conversations: Sequence[object]) -> bool:
    """Whether a prompt's own column holds one of the conversations' shared messages, or their beginning."""
    if given in [*conversations, *(message.get("content") for message in prompt)]:
        return True
    without_system = prompt[1:] if _role(prompt[0]) == "system" else prompt
    return is_messages(given) and any(_begins(own, given) for own in (prompt, without_system))  # type: ignore[arg-type]


def with_settled_turns(row: Row) -> Row:
    """The row whose prompt has the questions and tool results that all of its completions begin with.

    Completions that are whole conversations, which hold the prompt again, lose it first.

    Raises:
        BadRow: a completion begins with a question although the prompt has ended with one.
        UnusableRow: the completions are whole conversations, with different prompts.
    """
    if not is_messages(row.prompt):
        return row
    prompt: list[Message] = row.prompt  # type: ignore[assignment]
    completions: list[list[Message]] = list(row.completions)  # type: ignore[arg-type]
    if are_whole(prompt, completions):
        prompt, completions = _parted(prompt, completions)
    while all(own[0]["role"] != "assistant" and _bare(own[0]) == _bare(completions[0][0]) for own in completions):
        prompt, completions = [*prompt, completions[0][0]], [own[1:] for own in completions]
    for k, own in enumerate(completions):
        if not _fits(prompt, own):
            problem = (
                f"begins with the role {own[0]['role']} behind a prompt that ends with the role {prompt[-1]['role']}"
            )
            raise BadRow(f"completions[{k}]", problem, "begin it with the assistant's message")
    return row if prompt is row.prompt else changed(row, prompt=prompt, completions=tuple(completions))


def _parted(prompt: list[Message], conversations: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """The conversations' own beginning up to the end of the prompt that is given beside them, and what follows it."""
    ends = [_end(prompt, own) for own in conversations]
    for k, end in enumerate(ends):
        if end is None or end == len(conversations[k]):
            raise BadRow(f"completions[{k}]", "a conversation without the prompt", "give what the assistant answers")
    begun = [[_bare(message) for message in own[:end]] for own, end in zip(conversations, ends, strict=True)]
    if any(own != begun[0] for own in begun):
        raise UnusableRow("prompt mismatch between the completions")
    return conversations[0][: ends[0]], [own[end:] for own, end in zip(conversations, ends, strict=True)]


def _end(prompt: list[Message], conversation: list[Message]) -> int | None:
    """Where a prompt ends in a conversation that begins with it, perhaps behind a system text, or has it as a turn."""
    for before in (0, 1):
        if _begins(conversation[before:], prompt) and (before == 0 or _role(conversation[0]) == "system"):
            return before + len(prompt)
    alone = _bare(prompt[-1]) if len(prompt) == 1 else None
    return next((k + 1 for k, message in enumerate(conversation) if _bare(message) == alone), None)


def split_messages(messages: list[dict[str, Any]], where: str) -> tuple[list[Message], list[Message]]:
    """The prompt and the completion of a conversation: its last message, with the tool calls that led to it.

    Where the assistant's messages have weights of their own, the completion begins with the first that counts.

    Args:
        messages: of any spelling.
        where: the field that holds them, for refusals.

    Raises:
        BadRow: see `conversation`.
    """
    own = conversation(messages, where)
    weighted = any(message.get(key) is not None for message in messages for key in WEIGHT_KEYS)
    counts = (i for i, message in enumerate(own) if message["role"] == "assistant" and message.get("weight", 1))
    begin = next(counts, 0) if weighted else len(own) - 1
    if not weighted:
        while begin > 0 and own[begin - 1]["role"] in OPEN:
            begin -= 1
        called = any(message["role"] == "tool" for message in own[begin:])
        begin = begin if called else len(own) - 1
    begin = begin or len(own) - 1
    return [_bare(message) for message in own[:begin]], own[begin:]


def in_one_spelling(value: Any, where: str) -> Any:
    """A conversation's messages in the one spelling; anything else as it is."""
    return conversation(value, where) if is_messages(value) else value


def _first_question(conversation: Sequence[Message]) -> object:
    return next((message.get("content") for message in conversation if _role(message) == "user"), None)


def _last_answer(conversation: Sequence[Message]) -> int:
    places = [i for i, message in enumerate(conversation) if _role(message) == "assistant"]
    return places[-1] if places else len(conversation) - 1


def _fits(prompt: list[Message], rest: list[Message]) -> bool:
    return _role(rest[0]) in ("assistant", None) or _role(prompt[-1]) in OPEN


def _begins(conversation: Sequence[Message], start: Sequence[Message]) -> bool:
    pairs = zip(conversation, start, strict=False)
    return len(start) <= len(conversation) and all(_bare(own) == _bare(other) for own, other in pairs)


def _bare(message: Message) -> Message:
    """The message without what a file may say of it and not of its twin."""
    return {key: value for key, value in message.items() if key != "weight"}


def _role(message: Message) -> object:
    return message.get("role")
