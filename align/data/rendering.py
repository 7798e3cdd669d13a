"""A row's prompt and completions as the texts that are tokenised, and what happened to them on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from align.data.boundary import Tokens
from align.data.schema import Message, Text
from align.data.texts import Template
from align.data.turns import Conversation, Learn, conversation_of, has_turns
from rewards.dropped import refuse_lost, refuse_lost_tools
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
        "marks_differ": Value("int64"),
    }
)
"""What is counted per row while its texts are made; see `Audit` for the words."""
LISTS = tuple(name for name, kind in RENDERED.items() if isinstance(kind, List))
ZEROS = {name: 0 for name in RENDERED if name not in LISTS} | {"bos_stripped": False}


def untouched() -> dict[str, Any]:
    """The counts of a row that comes as token ids."""
    return {**ZEROS, **{name: [] for name in LISTS}}


def render(
    prompt: str | list[Message],
    completions: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    *,
    options: Mapping[str, Any],
    special: Tokens,
    append_eos: bool | None,
    learn: Learn = "assistant",
) -> dict[str, Any]:
    """The prompt, then the prompt with each completion.

    Args:
        prompt: text, or messages; where the last message is the assistant's, completions continue it.
        completions: texts, or lists of messages, like the prompt.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own template.
        options: what the row gives the template besides.
        special: the tokenizer's.
        append_eos: as in `tokenize_rows`; unless it is None, white space after a special token at a conversation's end
            is left out, so that the completion ends with its end-of-turn token.
        learn: which messages of a completion of several are learnt; `completion` keeps that white space too.

    Returns:
        `texts`, 1 + K of them, the counts of RENDERED, `closed` (completions that get no end token, as none is missing
        or the last message is not the assistant's), and `spans` where not every character of a completion is learnt.

    Raises:
        Dropped: the template drops what it must not.
        ValueError: the template refuses the conversation.

    Source: ours
    """
    if isinstance(prompt, str):
        return _plain(prompt, [str(own) for own in completions], tokenizer, options, special, append_eos)
    template = Template(tokenizer, chat_template, options)
    finished = all(own[0]["role"] != "assistant" for own in completions)  # type: ignore[index, call-overload]
    prompt, started, ends = template.mended(prompt, finished=finished)
    before = template.apply(prompt) if finished else template.before_answer(prompt)
    refuse_lost_tools(options, lambda own: replace(template, options=own).before_answer(prompt, joined=not finished))
    turns = any(has_turns(own) for own in completions)  # type: ignore[arg-type]
    learnt = learn if append_eos is not None else None
    found = [_conversation(prompt, own, template, special, before, learnt, turns) for own in completions]  # type: ignore[arg-type]
    of_prompt, of_completions = _left_out(found, completions, template, learnt or "last")  # type: ignore[arg-type]
    bare = [own.text.rstrip() for own in found]
    ends_here = [text.endswith(special.specials) for text in bare]
    cut = [
        append_eos is not None and learn != "completion" and text != own.text and end
        for text, own, end in zip(bare, found, ends_here, strict=True)
    ]
    counts: dict[str, Any] = {
        "bos_stripped": started,
        "prompt_ends": ends,
        "unread_options": template.unread(),
        "repeated_heads": sum(own.heads for own in found),
        "repeated_ends": sum(own.ends for own in found),
        "marks_differ": sum(own.marks_differ for own in found),
        "white_behind_end": sum(cut),
        "prompt_left_out": sorted({f"{prompt[place]['role']} {key}" for place, key in of_prompt}),
        "completion_left_out": of_completions,
    }
    return {
        "texts": [before, *(text if short else own.text for text, own, short in zip(bare, found, cut, strict=True))],
        "closed": [
            own[-1]["role"] != "assistant" or (learn == "completion" and end)  # type: ignore[index, call-overload]
            for own, end in zip(completions, ends_here, strict=True)
        ],
        "spans": [own.spans for own in found] if turns and any(own.spans for own in found) else None,
        **counts,
    }


def _left_out(
    found: Sequence[Conversation], completions: Sequence[list[Message]], template: Template, learn: Learn
) -> tuple[set[tuple[int, str]], list[str]]:
    """What the template drops of the prompt, by message and key, and the keys that it drops of completions.

    Raises:
        Dropped: among it is what must not be dropped.
    """
    of_prompt: set[tuple[int, str]] = set()
    of_completions = []
    for own, completion in zip(found, completions, strict=True):
        lost = left_out(own.messages, own.text, template.apply)
        refuse_lost(own.messages, lost, _answers(own, completion, learn))
        of_prompt |= {(place, key) for place, key in lost if place < own.first}
        of_completions += [key for place, key in lost if place >= own.first]
    return of_prompt, of_completions


def _answers(own: Conversation, completion: Sequence[Message], learn: Learn) -> list[int]:
    """The places of the messages that are learnt as generation writes them; as context the template may shorten one."""
    learnt = [k for k, message in enumerate(completion) if message["role"] == "assistant" and message.get("weight", 1)]
    return [own.first + k for k in (learnt if learn == "assistant" else learnt[-1:])]


def _conversation(
    prompt: list[Message],
    completion: list[Message],
    template: Template,
    special: Tokens,
    before: str,
    learn: Learn | None,
    turns: bool,
) -> Conversation:
    """The prompt with a completion; where all are one message that is learnt whole, nothing is looked up."""
    if turns:
        return conversation_of(prompt, completion, template, special, learn)
    bos = start_text(template.tokenizer)
    messages, head, end = with_answer(prompt, completion[0], bos, special.tags, before, template.apply)
    return Conversation(messages, len(messages) - 1, template.apply(messages), heads=head, ends=end)


def _plain(
    prompt: str,
    completions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    special: Tokens,
    append_eos: bool | None,
) -> dict[str, Any]:
    counts: dict[str, Any] = untouched() | {"unread_options": list(options)}
    texts, bos = [prompt], start_text(tokenizer)
    eos = "" if append_eos is False else str(tokenizer.eos_token or "")
    for given in completions:
        own, head, end = plain_answer(prompt, given, bos, eos, special.tags)
        counts["repeated_heads"] += head
        counts["repeated_ends"] += end
        texts.append(prompt + own)
    return {"texts": texts, "closed": [False] * len(completions), "spans": None, **counts}
