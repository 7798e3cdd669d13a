"""Two contrasting contexts for the same completion tokens: what T-REG's token rewards are read under."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from align.data.boundary import Tokens, started
from align.data.schema import Message, Text, is_messages
from align.data.texts import render_prompt

Side = Literal["better", "worse"]
Templates = dict[Side, str | None]
"""A text with `{prompt}` and perhaps `{response}`; None for the default."""

CONTEXTS = Features({"better_ids": List(List(Value("int32"))), "worse_ids": List(List(Value("int32")))})
"""Of every list one context for all completions, or one for each."""

ANSWERS: Templates = {
    "better": "helpful, correct, coherent and concise",
    "worse": "unhelpful, incorrect, incoherent and verbose",
}


def default_template(side: Side, *, chat: bool) -> str:
    """The template of a side: for the last user message of a conversation, or for a plain text prompt.

    Source: T-REG, arXiv:2412.02685 (published notes); the wording is ours.
    """
    if chat:
        return f"{{prompt}}\n\n(Give an answer that is {ANSWERS[side]}.)"
    return f"The following answer is {ANSWERS[side]}.\n\n{{prompt}}"


def contrast_contexts(
    prompt: Text,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[Sequence[int]],
    *,
    moved_tokens: int,
    templates: Templates,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    special: Tokens,
    options: Mapping[str, Any] | None = None,
    finished: bool = False,
) -> dict[str, list[list[int]]]:
    """The tokens before the completions under either template; the completions' own tokens stay what they are.

    A plain prompt is put into the template as text, and the whole is tokenised: tokens differ where the two meet. Only
    where that cannot be (a prompt given as token ids or cut to fit, a template that holds the response's own tokens or
    goes on behind a prompt whose last tokens count as the completions') are the prompt's own tokens put between the
    template's. In a conversation the template takes the place of the last user message, and the chat template is
    applied again.

    Args:
        prompt: of the row.
        prompt_ids: as the policy reads it.
        completion_ids: likewise, end token included.
        moved_tokens: last tokens of the prompt that count as the completions' first.
        chat_template: Jinja text that replaces the tokenizer's own.
        options: what the row gives the chat template besides.
        finished: whether the prompt's last message is over, as the completions begin with another's than the
            assistant's.

    Returns:
        CONTEXTS: one context for all completions, or one for each where the template has a `{response}`.

    Source: ours
    """

    def context(template: str, completion: Sequence[int]) -> list[int]:
        answer = completion[:-1] if completion and completion[-1] in special.ends else completion
        if not is_messages(prompt):
            whole = _tokenised_whole(template, prompt, prompt_ids, moved_tokens, tokenizer, special)
            return whole or _around(template, prompt_ids, answer, tokenizer, special)
        text = template.replace("{response}", str(tokenizer.decode(list(answer), skip_special_tokens=True)).strip())
        changed = _in_last_user_message(prompt, text)  # type: ignore[arg-type]
        rendered = render_prompt(changed, tokenizer, chat_template, options, finished=finished)
        ids, _ = started(tokenizer(rendered, add_special_tokens=False)["input_ids"], special, templated=True)
        return ids[: len(ids) - moved_tokens]

    contexts = {}
    for side, own in templates.items():
        template = own or default_template(side, chat=is_messages(prompt))
        each = completion_ids if "{response}" in template else completion_ids[:1]
        contexts[f"{side}_ids"] = [context(template, ids) for ids in each]
    return contexts


def _tokenised_whole(
    template: str,
    prompt: Text,
    prompt_ids: Sequence[int],
    moved_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    special: Tokens,
) -> list[int]:
    """The template with the prompt's text in it, as the policy would read that; none where this is not its prompt."""

    def ids(text: str) -> list[int]:
        return started(tokenizer(text, add_special_tokens=False)["input_ids"], special, templated=False)[0]

    if not isinstance(prompt, str) or "{response}" in template:
        return []
    own, whole = ids(prompt), ids(template.replace("{prompt}", prompt))
    kept, moved = own[: len(own) - moved_tokens], own[len(own) - moved_tokens :]
    same_end = whole[len(whole) - moved_tokens :] == moved
    return whole[: len(whole) - moved_tokens] if kept == list(prompt_ids) and same_end else []


def _around(
    template: str,
    prompt_ids: Sequence[int],
    answer: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    special: Tokens,
) -> list[int]:
    """The template with token ids in its slots; the start token stands before it."""
    prefix = list(special.prefix)
    bare = prompt_ids[len(prefix) :] if list(prompt_ids[: len(prefix)]) == prefix else prompt_ids
    ids = prefix
    for piece in re.split(r"(\{prompt\}|\{response\})", template):
        if piece == "{prompt}":
            ids += bare
        elif piece == "{response}":
            ids += answer
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def _in_last_user_message(prompt: list[Message], template: str) -> list[Message]:
    place = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
    content = template.replace("{prompt}", prompt[place]["content"])
    return [*prompt[:place], {**prompt[place], "content": content}, *prompt[place + 1 :]]
