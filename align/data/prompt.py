"""What is done to a row's prompt: a system text beside it goes in front, answers that repeat it lose the repetition."""

import re

from align.data.columns import MARKS
from align.data.schema import BadRow, Message, Row, Text, changed, is_messages, is_token_ids

LONG = 40
"""Characters of a prompt that no answer begins with by chance."""
DIALOGUE = re.compile(MARKS.pattern + r"|^\s*(?:Human|User):")
"""What stands before the first turn of a dialogue."""


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
        return prompt if _holds(prompt, system.strip()) else f"{system.rstrip()}\n\n{prompt.lstrip(chr(10))}"
    if not is_messages(prompt):
        return prompt
    messages: list[Message] = prompt  # type: ignore[assignment]
    own = [message.get("content") for message in messages if message.get("role") in ("system", "developer")]
    if not own:
        return [{"role": "system", "content": system}, *messages]
    if system not in own:
        raise BadRow("system", "another text than the conversation's own system message", "keep one of the two")
    return prompt


def _holds(prompt: str, system: str) -> bool:
    """Whether the text stands there whole; a lone word may well be another's or the question's own."""
    return len(system.split()) > 1 and re.search(rf"(?<!\w){re.escape(system)}(?!\w)", prompt) is not None


def without_repetition(row: Row, asked: object) -> Row:
    """A row whose completions repeat its prompt, without the repetition, or marked as one that keeps it.

    White space may differ. A prompt of one short line may well begin an answer ("Hello", and "Hello to you"), and in a
    conversation an answer may quote the question; only a plain prompt that is long, has several lines or ends with a
    colon is cut.

    Args:
        row: of text, messages or token ids.
        asked: its prompt without the system text; answers may repeat either.
    """
    for prompt in (row.prompt,) if asked is row.prompt else (row.prompt, asked):
        text = prompt[-1].get("content") if is_messages(prompt) else prompt  # type: ignore[index]
        rests = []
        for entry in row.completions:
            if (rest := _behind(text, _answer(entry))) is None:  # nearly always the first
                break
            rests.append(rest)
        else:
            if not isinstance(row.prompt, str) or not _is_unmistakable(str(text)):
                return changed(row, repeated="kept")
            return changed(row, completions=tuple(rests), repeated="cut")
    return row


def check_answers(row: Row) -> None:
    """Refuse answers that hold what belongs before them, and a prompt that holds an answer.

    Raises:
        BadRow: all completions are dialogues that hold the prompt, or the prompt ends with one of the completions.
    """
    prompt, answers = row.prompt, [_answer(entry) for entry in row.completions]
    if isinstance(prompt, str) and all(isinstance(text, str) and _is_dialogue_of(text, prompt) for text in answers):
        remedy = "give the answer alone, or leave the prompt's column out where the dialogue has it all"
        raise BadRow("completions[0]", "a dialogue that holds the prompt again", remedy)
    if is_messages(prompt):
        last: Message = prompt[-1]  # type: ignore[assignment]
        if last.get("role") == "assistant" and last["content"] and last["content"] in answers:
            raise BadRow("prompt", "it ends with one of the completions", "end it with the user's message")


def _answer(completion: Text) -> object:
    """What a completion begins with; None where another than the assistant says that."""
    if not is_messages(completion):
        return completion
    first: Message = completion[0]  # type: ignore[assignment]
    return first["content"] if first["role"] == "assistant" else None


def _behind(prompt: object, answer: object) -> str | None:
    """What an answer says behind the prompt that it begins with, whatever their white space; None where it does not."""
    if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt.strip():
        return None
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    if answer.lstrip()[:1] != prompt.lstrip()[:1]:  # nearly always so, and splitting takes longer
        return None
    words = prompt.split()
    found = answer.split(None, len(words) - 1)
    if len(found) < len(words) or found[:-1] != words[:-1] or not found[-1].startswith(words[-1]):
        return None
    rest = found[-1][len(words[-1]) :]
    return rest.lstrip() if prompt[-1].isspace() else rest


def _is_dialogue_of(answer: str, prompt: str) -> bool:
    before, found, _ = answer.partition(prompt.strip())
    return bool(found) and DIALOGUE.search(before) is not None


def _is_unmistakable(prompt: str) -> bool:
    return len(prompt) >= LONG or "\n" in prompt.strip() or prompt.rstrip().endswith(":")
