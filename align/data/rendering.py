"""A row's prompt and completions as the texts that are tokenised, and what happened to them on the way."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from align.data.boundary import Tokens
from align.data.schema import Message, Text
from align.data.texts import Template, start_text
from rewards.templates import left_out, repeated_head, without_second_ends

RENDERED = Features(
    {
        "prompt_left_out": List(Value("string")),
        "completion_left_out": List(Value("string")),
        "bos_stripped": Value("bool"),
        "prompt_ends": Value("int64"),
        "repeated_heads": Value("int64"),
        "repeated_ends": Value("int64"),
        "white_behind_end": Value("int64"),
        "unread_options": List(Value("string")),
    }
)
"""What is counted per row while its texts are made; see `Audit` for the words."""


def untouched() -> dict[str, Any]:
    """The counts of a row that comes as token ids."""
    return {name: [] if isinstance(kind, List) else 0 for name, kind in RENDERED.items()} | {"bos_stripped": False}


def render(
    prompt: str | list[Message],
    completions: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    *,
    options: Mapping[str, Any],
    special: Tokens,
    append_eos: bool | None,
) -> dict[str, Any]:
    """The prompt, then the prompt with each completion.

    Args:
        prompt: text, or messages; where the last message is the assistant's, completions continue it.
        completions: texts, or lists of one assistant message, like the prompt.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own template.
        options: what the row gives the template besides.
        special: the tokenizer's.
        append_eos: as in `tokenize_rows`; unless it is None, white space after a special token at a conversation's end
            is left out, so that the completion ends with its end-of-turn token.

    Returns:
        `texts`, 1 + K of them, and the counts of RENDERED.

    Raises:
        ValueError: the template refuses the conversation.

    Source: ours
    """
    if isinstance(prompt, str):
        return _plain(prompt, [str(own) for own in completions], tokenizer, options, special, append_eos)
    template = Template(tokenizer, chat_template, options)
    prompt, started, ends = template.mended(prompt)
    counts: dict[str, Any] = untouched() | {
        "bos_stripped": started,
        "prompt_ends": ends,
        "unread_options": template.unread(),
    }
    texts = [template.before_answer(prompt)]
    lost_of_prompt: set[tuple[int, str]] = set()
    for completion in completions:
        answer: Message = completion[0]  # type: ignore[assignment]
        conversation = _conversation(prompt, answer, texts[0], template, special, counts)
        text = template.apply(conversation)
        for place, key in left_out(conversation, text, template.apply):
            if place == len(conversation) - 1:
                counts["completion_left_out"].append(key)
            else:
                lost_of_prompt.add((place, key))
        ended = text.rstrip()
        if append_eos is not None and ended != text and ended.endswith(special.specials):
            counts["white_behind_end"] += 1
            text = ended
        texts.append(text)
    counts["prompt_left_out"] = sorted({f"{prompt[place]['role']} {key}" for place, key in lost_of_prompt})
    return {"texts": texts, **counts}


def _conversation(
    prompt: list[Message],
    answer: Message,
    before: str,
    template: Template,
    special: Tokens,
    counts: dict[str, Any],
) -> list[Message]:
    """The prompt with an answer, less what the answer brings and the template writes too."""
    content = answer["content"].removeprefix(start_text(template.tokenizer))
    head = repeated_head(before, content, special.tags)
    if head:
        whole = template.apply(_with_answer(prompt, {**answer, "content": content}))
        own = whole[len(before) :].lstrip() if whole.startswith(before) else ""
        content = content[head:] if own.startswith(content[:head].strip()) else content
    counts["repeated_heads"] += content != answer["content"]
    conversation = _with_answer(prompt, {**answer, "content": content})
    conversation, ends = without_second_ends(conversation, [len(conversation) - 1], template.apply)
    counts["repeated_ends"] += ends
    return conversation


def _with_answer(prompt: list[Message], answer: Message) -> list[Message]:
    if prompt[-1]["role"] != "assistant":
        return [*prompt, answer]
    return [*prompt[:-1], {**prompt[-1], **answer, "content": prompt[-1]["content"] + answer["content"]}]


def _plain(
    prompt: str,
    completions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    special: Tokens,
    append_eos: bool | None,
) -> dict[str, Any]:
    counts: dict[str, Any] = untouched() | {"unread_options": list(options)}
    texts = [prompt]
    for given in completions:
        own = given.removeprefix(start_text(tokenizer))
        own = own[repeated_head(prompt, own, special.tags) :]
        counts["repeated_heads"] += own != given
        ended = _with_one_end(own, tokenizer.eos_token) if append_eos else own
        counts["repeated_ends"] += ended != own
        texts.append(prompt + ended)
    return {"texts": texts, **counts}


def _with_one_end(text: str, eos: Any) -> str:
    """The text with its end token once and nothing behind it, where it brings one."""
    if not text.rstrip().endswith(str(eos)):
        return text
    return re.sub(rf"(?:{re.escape(str(eos))}\s*)+$", lambda _: str(eos), text)
