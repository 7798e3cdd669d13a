"""What a chat template does with the texts of a conversation: what it would write twice, and what it leaves out."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
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
    prompt: Conversation, bos: str, before_answer: Render, apply: Render, *, finished: bool = False
) -> tuple[Conversation, bool, int]:
    """A prompt without what it brings and the template writes too.

    Args:
        bos: the start token as text, or "".
        before_answer: applies the template up to where the completion begins.
        apply: applies the template.
        finished: whether the last message is over even where it is the assistant's.

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
    over = range(len(prompt) - (not finished and prompt[-1]["role"] == "assistant"))
    prompt, ends = without_second_ends(prompt, over, apply)
    return prompt, doubled, ends


def with_answer(
    prompt: Conversation,
    answer: dict[str, Any],
    bos: str,
    tags: Sequence[str],
    before: str,
    apply: Render,
    *,
    joined: bool = True,
) -> tuple[Conversation, bool, int]:
    """A prompt with an answer, less what the answer brings and the template writes too.

    Args:
        prompt: where the assistant's message is its last and `joined`, the answer continues that.
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
        whole = apply(_continued(prompt, {**answer, "content": content}, joined))
        own = whole[len(before) :].lstrip() if whole.startswith(before) else ""
        content = content[head:] if own.startswith(content[:head].strip()) else content
    conversation = _continued(prompt, {**answer, "content": content}, joined)
    conversation, ends = without_second_ends(conversation, [len(conversation) - 1], apply)
    return conversation, content != answer["content"], ends


def with_message(
    conversation: Conversation,
    message: dict[str, Any],
    bos: str,
    tags: Sequence[str],
    before: Render,
    apply: Render,
    *,
    joined: bool = False,
) -> tuple[Conversation, bool, int]:
    """A conversation with one message of a completion, less what that brings and the template writes too.

    Args:
        before: applies the template up to where the assistant answers; called where the message may repeat that.
        joined: whether the assistant's message continues the conversation's last.

    Returns:
        As `with_answer`; a message's own `weight` is no longer in it.

    Source: ours
    """
    bare = {key: value for key, value in message.items() if key != "weight"}
    if bare["role"] != "assistant":
        whole, ends = without_second_ends([*conversation, bare], [len(conversation)], apply)
        return whole, False, ends
    repeats = bare["content"].removeprefix(bos).lstrip().startswith(tuple(tags))
    text = before(conversation) if repeats else ""
    return with_answer(conversation, bare, bos, tags, text, apply, joined=joined)


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

    A long text is looked for in what was rendered, as it is or as JSON writes it, each at a place of its own. A short
    one, or one of two that are equal, could be found by chance: the conversation is rendered once more with a mark
    behind each of these. Calls of tools are rendered once more with a mark in each name and one more argument. Ids of
    calls, and the name beside a tool's result, which its call has too, are not looked for.

    Args:
        rendered: the conversation as the template wrote it.
        render: applies the template.

    Returns:
        Place and key of the messages' texts, such as (2, "reasoning_content").

    Source: ours
    """
    whole = flat = "".join(rendered.split())
    texts = [
        (place, key, _as_written(text, whole))
        for place, message in enumerate(conversation)
        for key, text in _texts(message)
    ]
    texts = [entry for entry in texts if entry[2]]
    times = Counter(text for _, _, text in texts)
    lost, doubtful = [], []
    for place, key, text in sorted(texts, key=lambda entry: -len(entry[2])):
        found = flat.find(text)
        if found >= 0:
            flat = f"{flat[:found]} {flat[found + len(text) :]}"
        if text not in whole or (found < 0 and times[text] == 1):
            lost.append((place, key))
        elif isinstance(conversation[place][key], str) and (len(text) < SURE or times[text] > 1):
            doubtful.append((place, key))
    return sorted({*lost, *_without_mark(conversation, doubtful, render), *_lost_calls(conversation, render)})


def _as_written(text: str, whole: str) -> str:
    """A text without white space, as it is or as JSON writes it if it only stands so there."""
    bare = _without_space(text)
    if bare in whole:
        return bare
    escaped = "".join(json.dumps(text, ensure_ascii=False)[1:-1].split())
    return escaped if escaped in whole else bare


@lru_cache(maxsize=256)
def _without_space(text: str) -> str:
    """Of a message, which every completion of its list is rendered with."""
    return "".join(text.split())


def _lost_calls(conversation: Conversation, render: Render) -> list[tuple[int, str]]:
    """The messages of whose calls a name or an argument is not written."""
    places = [place for place, message in enumerate(conversation) if message.get("tool_calls")]
    if not places:
        return []
    rendered = render([_with_marked_calls(own, place) for place, own in enumerate(conversation)])
    return [
        (place, "tool_calls")
        for place in places
        for number in range(len(conversation[place]["tool_calls"]))
        if any(MARK.format(f"{place}-{number}{part}") not in rendered for part in "nkv")
    ]


def _with_marked_calls(message: dict[str, Any], place: int) -> dict[str, Any]:
    """A message whose calls have a mark behind the name, and one as the key and the value of another argument."""
    if not message.get("tool_calls"):
        return message
    marked = []
    for number, call in enumerate(message["tool_calls"]):
        name, key, value = (MARK.format(f"{place}-{number}{part}") for part in "nkv")
        own = call["function"]
        function = {"name": own["name"] + name, "arguments": {**own["arguments"], key: value}}
        marked.append({**call, "function": {**own, **function}})
    return {**message, "tool_calls": marked}


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
    """Every text of a message but its role and its calls, under its key; the content first."""
    if len(message) == 2 and isinstance(message.get("content"), str):
        yield "content", message["content"]
        return
    besides = ("role", "tool_calls", "tool_call_id", *(("name",) if message.get("role") == "tool" else ()))
    for key in sorted(message, key=lambda key: key != "content"):
        if key not in besides:
            yield from ((key, text) for text in _strings(message[key]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for own in value.values() if isinstance(value, dict) else value:
            yield from _strings(own)


def _with_content(conversation: Conversation, place: int, content: str) -> Conversation:
    return [*conversation[:place], {**conversation[place], "content": content}, *conversation[place + 1 :]]


def _continued(prompt: Conversation, answer: dict[str, Any], joined: bool) -> Conversation:
    if not joined or prompt[-1]["role"] != "assistant":
        return [*prompt, answer]
    return [*prompt[:-1], {**prompt[-1], **answer, "content": prompt[-1]["content"] + answer["content"]}]
