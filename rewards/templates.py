"""What a chat template does with the texts of a conversation: what it would write twice, and what it leaves out."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, Any]]
"""Messages with a `role`, a `content` and whatever else a row gives them."""
Render = Callable[[Conversation], str]
"""The chat template, as it is applied to a conversation."""

VOLATILE = re.compile(r"\b(strftime_now|random|lipsum)\b")
"""What a template can call that gives another text tomorrow."""
TAG = r"<[^<>\s]+>|\[/?[A-Z_]+\]"
"""How the tokens that end or begin a turn are written."""
TAGS_AT_END = re.compile(rf"(?:\s*(?:{TAG}))+\s*$")
MARK = "\ue000{}\ue001"
"""Of the private use area, so that no template looks for it and no text holds it."""
SURE = 32
"""Characters, less white space, from which on a text is not found by chance in what the template itself writes."""


def without_second_ends(conversation: Conversation, places: Sequence[int], render: Render) -> tuple[Conversation, int]:
    """The conversation without the end-of-turn tokens that messages bring and the template writes behind them too.

    Args:
        places: of the messages that are looked at.
        render: applies the template.

    Returns:
        The conversation, and in how many messages something was taken away.

    Source: ours
    """
    mended = 0
    for place in places:
        content = conversation[place]["content"]
        tags = TAGS_AT_END.search(content) if content.rstrip().endswith((">", "]")) else None
        if tags is None:
            continue
        mark = MARK.format("")
        _, found, behind = render(_with_content(conversation, place, content[: tags.start()] + mark)).partition(mark)
        written = behind.lstrip() if found else ""
        second = next((tag for tag in re.finditer(TAG, tags[0]) if written.startswith(tag[0])), None)
        if second is not None:
            conversation = _with_content(conversation, place, content[: tags.start() + second.start()])
            mended += 1
    return conversation, mended


def repeated_head(prompt: str, completion: str, tokens: Sequence[str]) -> int:
    """How many of a completion's first characters repeat the end of its prompt, from one of the tokens on.

    Such is `<|im_start|>assistant` at the beginning of an answer whose prompt ends with it.

    Source: ours
    """
    body = completion.lstrip()
    first = next((token for token in tokens if body.startswith(token)), None)
    if first is None:
        return 0
    for start in re.finditer(re.escape(first), prompt):
        head = prompt[start.start() :].rstrip()
        if body.startswith(head):
            behind = body[len(head) :]
            return len(completion) - len(behind.removeprefix(prompt[start.start() + len(head) :]))
    return 0


def mended_prompt(
    prompt: Conversation, bos: str, before_answer: Render, apply: Render
) -> tuple[Conversation, bool, int]:
    """A prompt without what it brings and the template writes too.

    Args:
        bos: the start token as text, or "".
        before_answer: applies the template up to where the completion begins.
        apply: applies the template.

    Returns:
        The messages, whether one start token was taken away, and from how many messages an end-of-turn token.

    Source: ours
    """
    bare = prompt[0]["content"].removeprefix(bos)
    doubled = bare != prompt[0]["content"]
    if doubled:
        without = _with_content(prompt, 0, bare)
        doubled = before_answer(without).startswith(bos)
        prompt = without if doubled else prompt
    finished = range(len(prompt) - (prompt[-1]["role"] == "assistant"))
    prompt, ends = without_second_ends(prompt, finished, apply)
    return prompt, doubled, ends


def with_answer(
    prompt: Conversation, answer: dict[str, Any], bos: str, tags: Sequence[str], before: str, apply: Render
) -> tuple[Conversation, bool, int]:
    """A prompt with an answer, less what the answer brings and the template writes too.

    Args:
        prompt: where the assistant's message is its last, the answer continues that.
        bos: the start token as text, or "".
        tags: the tokens that `repeated_head` looks for.
        before: the prompt as rendered.
        apply: applies the template.

    Returns:
        The conversation, whether the answer lost something at its beginning, and 1 if an end-of-turn token.

    Source: ours
    """
    content = answer["content"].removeprefix(bos)
    head = repeated_head(before, content, tags)
    if head:
        whole = apply(_continued(prompt, {**answer, "content": content}))
        own = whole[len(before) :].lstrip() if whole.startswith(before) else ""
        content = content[head:] if own.startswith(content[:head].strip()) else content
    conversation = _continued(prompt, {**answer, "content": content})
    conversation, ends = without_second_ends(conversation, [len(conversation) - 1], apply)
    return conversation, content != answer["content"], ends


def plain_answer(prompt: str, answer: str, bos: str, eos: str, tags: Sequence[str]) -> tuple[str, bool, bool]:
    """A text that follows a prompt, less what it repeats of the prompt's end and of its own end token.

    Args:
        eos: the end token as text, or "" for one that is not looked at.

    Returns:
        The text, and whether it lost something at its beginning and at its end.

    Source: ours
    """
    bare = answer.removeprefix(bos)
    bare = bare[repeated_head(prompt, bare, tags) :]
    ended = bare
    if eos and bare.rstrip().endswith(eos):
        ended = re.sub(rf"(?:{re.escape(eos)}\s*)+$", lambda _: eos, bare)
    return ended, bare != answer, ended != bare


def start_text(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The start token as text; empty where there is none, or where it is the end token as well."""
    bos = tokenizer.bos_token
    return str(bos) if bos and bos != tokenizer.eos_token else ""


def tags_of(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Added tokens that are written like `<this>`, special or not; the start token is none of them."""
    added = [str(text) for token, text in tokenizer.added_tokens_decoder.items() if token != tokenizer.bos_token_id]
    return tuple(text for text in added if re.fullmatch(TAG, text))


def left_out(conversation: Conversation, rendered: str, render: Render) -> list[tuple[int, str]]:
    """The texts that a template has left out, wholly or in part; white space does not count.

    A long text is looked for in what was rendered, each at a place of its own. A short one, or one of two that are
    equal, could be found by chance: the conversation is rendered once more with a mark behind each of these.

    Args:
        rendered: the conversation as the template wrote it.
        render: applies the template.

    Returns:
        Place and key of the messages' texts, such as (2, "reasoning_content").

    Source: ours
    """
    texts = [
        (place, key, "".join(text.split()))
        for place, message in enumerate(conversation)
        for key, text in _texts(message)
    ]
    texts = [entry for entry in texts if entry[2]]
    times = Counter(text for _, _, text in texts)
    whole = flat = "".join(rendered.split())
    lost, doubtful = [], []
    for place, key, text in sorted(texts, key=lambda entry: -len(entry[2])):
        found = flat.find(text)
        if found >= 0:
            flat = f"{flat[:found]} {flat[found + len(text) :]}"
        if text not in whole or (found < 0 and times[text] == 1):
            lost.append((place, key))
        elif isinstance(conversation[place][key], str) and (len(text) < SURE or times[text] > 1):
            doubtful.append((place, key))
    return sorted({*lost, *_without_mark(conversation, doubtful, render)})


def _without_mark(
    conversation: Conversation, doubtful: Sequence[tuple[int, str]], render: Render
) -> list[tuple[int, str]]:
    if not doubtful:
        return []
    marked = [dict(message) for message in conversation]
    for number, (place, key) in enumerate(doubtful):
        marked[place][key] += MARK.format(number)
    rendered = render(marked)
    return [entry for number, entry in enumerate(doubtful) if MARK.format(number) not in rendered]


def _texts(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text of a message but its role, under its key; the content first."""
    for key in sorted(message, key=lambda key: key != "content"):
        if key != "role":
            yield from ((key, text) for text in _strings(message[key]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for own in value.values() if isinstance(value, dict) else value:
            yield from _strings(own)


def _with_content(conversation: Conversation, place: int, content: str) -> Conversation:
    return [*conversation[:place], {**conversation[place], "content": content}, *conversation[place + 1 :]]


def _continued(prompt: Conversation, answer: dict[str, Any]) -> Conversation:
    if prompt[-1]["role"] != "assistant":
        return [*prompt, answer]
    return [*prompt[:-1], {**prompt[-1], **answer, "content": prompt[-1]["content"] + answer["content"]}]
