"""A row's prompt and completions as the texts that are tokenised, and what happened to them on the way."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from align.data.boundary import Tokens
from align.data.schema import Message, Text
from align.data.texts import Template
from rewards.templates import left_out, plain_answer, start_text, with_answer

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
    template, bos = Template(tokenizer, chat_template, options), start_text(tokenizer)
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
        conversation, head, end = with_answer(prompt, answer, bos, special.tags, texts[0], template.apply)
        counts["repeated_heads"] += head
        counts["repeated_ends"] += end
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
    eos = "" if append_eos is False else str(tokenizer.eos_token or "")
    for given in completions:
        own, head, end = plain_answer(prompt, given, start_text(tokenizer), eos, special.tags)
        counts["repeated_heads"] += head
        counts["repeated_ends"] += end
        texts.append(prompt + own)
    return {"texts": texts, **counts}
