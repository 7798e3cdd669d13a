"""What is done to a row's prompt: a system text beside it goes in front, answers that repeat it lose the repetition."""

from collections.abc import Sequence
from dataclasses import replace

from align.data.schema import BadRow, Message, Row, Text, is_messages, is_token_ids

LONG = 40
"""Characters of a prompt that no answer begins with by chance."""


def with_system(prompt: object, completions: object, system: str) -> object:
    """The prompt with a system text: a message of its own in a conversation, else a paragraph before the text.

    A prompt that already holds the text stays as it is.

    Raises:
        BadRow: token ids, or a conversation with another system text.
    """
    if is_token_ids(prompt):
        raise BadRow("system", "a system text beside token ids", "give the prompt's ids with it, and no `system`")
    in_conversation = isinstance(completions, list) and any(not isinstance(text, str) for text in completions)
    if isinstance(prompt, str) and in_conversation:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        return prompt if system.strip() in prompt else f"{system.rstrip()}\n\n{prompt.lstrip(chr(10))}"
    if not is_messages(prompt):
        return prompt
    messages: list[Message] = prompt  # type: ignore[assignment]
    own = [message.get("content") for message in messages if message.get("role") in ("system", "developer")]
    if not own:
        return [{"role": "system", "content": system}, *messages]
    if system not in own:
        raise BadRow("system", "another text than the conversation's own system message", "keep one of the two")
    return prompt


def repeats_prompt(prompt: Text, completions: Sequence[Text]) -> bool:
    """Whether all completions begin with the whole prompt; of a conversation, with its last message."""
    text = prompt[-1]["content"] if is_messages(prompt) else prompt  # type: ignore[index, call-overload]
    if not isinstance(text, str):
        return False
    answers = [entry[0]["content"] if is_messages(entry) else entry for entry in completions]  # type: ignore[index, call-overload]
    return bool(answers) and all(isinstance(answer, str) and answer.startswith(text) for answer in answers)


def without_prompt(row: Row) -> Row:
    """A row whose completions repeat its prompt, without the repetition, or marked as one that keeps it.

    A prompt of one short line may well begin an answer ("Hello", and "Hello to you"), and in a conversation an answer
    may quote the question; only a plain prompt that is long, has several lines or ends with a colon is cut.
    """
    prompt = row.prompt
    if not isinstance(prompt, str) or not _is_unmistakable(prompt):
        return replace(row, repeated="kept")
    cut = tuple(text[len(prompt) :] for text in row.completions if isinstance(text, str))
    return replace(row, completions=cut, repeated="cut")


def _is_unmistakable(prompt: str) -> bool:
    return len(prompt) >= LONG or "\n" in prompt.strip() or prompt.rstrip().endswith(":")
