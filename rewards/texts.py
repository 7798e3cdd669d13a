"""Prompts and completions as text and as token ids."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewards.templates import mended_prompt, plain_answer, start_text, tags_of, with_answer
from rewards.types import Messages, RowError, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_texts(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    templated: bool = False,
) -> list[tuple[str, bool]]:
    """Each prompt as it stands before its completion: with the template's generation prompt in a conversation."""
    return [
        (prompt, templated)
        if isinstance(prompt, str) and isinstance(own, str)
        else (_before_answer(_mended(as_messages(prompt, "user"), tokenizer), tokenizer), True)
        for prompt, own in zip(prompts, completions, strict=True)
    ]


def token_ids(texts: Sequence[tuple[str, bool]], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids, with the tokenizer's special tokens where neither a template nor a start token has come first."""
    bos = tokenizer.bos_token
    framed = [not templated and not (bos and text.startswith(bos)) for text, templated in texts]
    ids: list[list[int]] = [[] for _ in texts]
    for frame in (True, False):
        chosen = [i for i, own in enumerate(framed) if own == frame]
        if chosen:
            found = tokenizer([texts[i][0] for i in chosen], add_special_tokens=frame)["input_ids"]
            for i, own in zip(chosen, found, strict=True):
                twice = frame and len(own) > 1 and own[-2] == own[-1] == tokenizer.eos_token_id  # the text brings one
                ids[i] = own[:-1] if twice else own
    return ids


def joint_ids(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    templated: bool = False,
) -> list[list[int]]:
    """Token ids of each prompt with its completion.

    Text is joined without anything between; messages go through the chat template, and a text beside messages counts
    as a user's prompt or an assistant's completion. A completion continues a prompt that the assistant ends.

    Args:
        templated: texts are what a chat template has made.

    Raises:
        RowError: a text has no tokens, or messages have no chat template.
    """
    bos, tags = start_text(tokenizer), tags_of(tokenizer)
    joint = [_joint(prompt, own, tokenizer, bos, tags) for prompt, own in zip(prompts, completions, strict=True)]
    ids = token_ids([(text, own or templated) for text, own in joint], tokenizer)
    if not all(ids):
        raise RowError("a prompt and its completion are both empty; there is nothing to score")
    return ids


def cut(ids: list[int], length: int) -> list[int]:
    """At most `length` tokens: the first, which often starts every text, and then the last ones."""
    return ids if len(ids) <= length else [ids[0], *ids[len(ids) - length + 1 :]]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many leading tokens all sequences share."""
    low, high = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))


def text_key(text: Text) -> str:
    """A text that two prompts (or completions) share exactly where they are the same."""
    # The mark tells a conversation from a text that spells one.
    return text if isinstance(text, str) else "\0" + json.dumps(text, sort_keys=True, ensure_ascii=False)


def plain(text: Text) -> str:
    """A text as it is; the content of a lone message; a conversation as one `role: content` per line."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)


def as_messages(text: Text, role: str) -> Messages:
    """A conversation; text becomes a message of the role."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _joint(
    prompt: Text, completion: Text, tokenizer: "PreTrainedTokenizerBase", bos: str, tags: tuple[str, ...]
) -> tuple[str, bool]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + plain_answer(prompt, completion, bos, str(tokenizer.eos_token or ""), tags)[0], False
    asked, (answer,) = _mended(as_messages(prompt, "user"), tokenizer), as_messages(completion, "assistant")
    head = answer["content"].removeprefix(bos).lstrip().startswith(tags)
    before = _before_answer(asked, tokenizer) if head else ""
    conversation, _, _ = with_answer(asked, answer, bos, tags, before, lambda messages: _render(messages, tokenizer))
    return _render(conversation, tokenizer), True


def _mended(prompt: Messages, tokenizer: "PreTrainedTokenizerBase") -> Messages:
    """The prompt as training reads it, without what the template writes too."""
    return mended_prompt(
        prompt,
        start_text(tokenizer),
        lambda messages: _before_answer(messages, tokenizer),
        lambda messages: _render(messages, tokenizer),
    )[0]


def _before_answer(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> str:
    open_end = messages[-1]["role"] == "assistant"
    return _render(messages, tokenizer, add_generation_prompt=not open_end, continue_final_message=open_end)


def _render(messages: Messages, tokenizer: "PreTrainedTokenizerBase", **options: Any) -> str:
    if tokenizer.chat_template is None:
        raise RowError(
            f"{tokenizer.name_or_path}: the rows hold messages, but this tokenizer has no chat template; "
            "give text rows or add a chat_template.jinja to the model's folder"
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
