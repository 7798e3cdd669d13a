"""Prompts and completions as text and as token ids."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rewards.dropped import OF_SCORER, Dropped, refuse_lost, refuse_lost_tools
from rewards.rendering import Unrendered, rendered
from rewards.spelling import REASONING, message_text, spelled
from rewards.templates import (
    left_out,
    mended_prompt,
    plain_answer,
    start_text,
    tags_of,
    with_message,
)
from rewards.types import Asked, Messages, RowError, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED = frozenset(("tool_calls", "name", REASONING))
"""Keys of messages that a template may drop unsaid."""


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
        else (ChatTemplate.of(tokenizer, prompt).before(prompt, own), True)
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
    if isinstance(text, str):
        return text
    own = {"messages": text, "given": given_of(text)} if given_of(text) else text
    return "\0" + json.dumps(own, sort_keys=True, ensure_ascii=False)  # the mark: a text may spell a conversation


def plain(text: Text) -> str:
    """A text as it is; what a lone message says; a conversation as one `role: content` per line, with JSON of calls."""
    if isinstance(text, str):
        return text
    tools = given_of(text).get("tools")
    if len(text) == 1 and not tools:
        return message_text(text[0])
    offered = [f"tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    return "\n".join([*offered, *(f"{message['role']}: {message_text(message)}" for message in text)])


def given_of(prompt: Text) -> dict[str, Any]:
    """What else than its messages a prompt gives a chat template."""
    return prompt.given if isinstance(prompt, Asked) else {}


def as_messages(text: Text, role: str) -> Messages:
    """A conversation; text becomes a message of the role."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _joint(
    prompt: Text, completion: Text, tokenizer: "PreTrainedTokenizerBase", bos: str, tags: tuple[str, ...]
) -> tuple[str, bool]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + plain_answer(prompt, completion, bos, str(tokenizer.eos_token or ""), tags)[0], False
    return ChatTemplate.of(tokenizer, prompt).whole(prompt, completion, bos, tags), True


@dataclass(frozen=True)
class ChatTemplate:
    """A scorer's own chat template, with what one prompt gives it."""

    tokenizer: "PreTrainedTokenizerBase"
    given: Mapping[str, Any]

    @staticmethod
    def of(tokenizer: "PreTrainedTokenizerBase", prompt: Text) -> "ChatTemplate":
        return ChatTemplate(tokenizer, given_of(prompt))

    def before(self, prompt: Text, completion: Text) -> str:
        """The prompt as it stands before its completion."""
        finished = _is_finished(completion)
        return self._before(self._mended(as_messages(prompt, "user"), finished=finished), joined=not finished)

    def whole(self, prompt: Text, completion: Text, bos: str, tags: tuple[str, ...]) -> str:
        """The prompt with its completion, as training reads them.

        Raises:
            RowError: the template drops what it must not.
        """
        finished = _is_finished(completion)
        talk = self._mended(as_messages(prompt, "user"), finished=finished)
        if self.given.get("tools"):
            self._check_tools(talk, joined=not finished)
        for place, message in enumerate(as_messages(completion, "assistant")):
            joined = place == 0 and not finished
            before = partial(self._before, joined=joined)
            talk, _, _ = with_message(talk, message, bos, tags, before, self._apply, joined=joined)
        text = self._apply(talk)
        if any(own["role"] == "tool" or own.keys() & CHECKED for own in talk):
            answer = max(place for place, own in enumerate(talk) if own["role"] == "assistant")
            with self._in_words():
                refuse_lost(talk, left_out(talk, text, self._apply), [answer], OF_SCORER)
        return text

    def _check_tools(self, talk: Messages, *, joined: bool) -> None:
        with self._in_words():
            refuse_lost_tools(self.given, lambda own: replace(self, given=own)._before(talk, joined=joined), OF_SCORER)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except Dropped as error:
            raise RowError(f"{self.tokenizer.name_or_path}: {error}; {error.remedy}") from None

    def _mended(self, prompt: Messages, *, finished: bool) -> Messages:
        """The prompt without what it brings and the template writes too."""
        return mended_prompt(prompt, start_text(self.tokenizer), self._before, self._apply, finished=finished)[0]

    def _before(self, messages: Messages, *, joined: bool = True) -> str:
        if joined and messages[-1]["role"] == "assistant":
            return self._apply(messages, continue_final_message=True)
        return self._apply(messages, add_generation_prompt=True)

    def _apply(self, messages: Messages, **flags: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise RowError(
                f"{self.tokenizer.name_or_path}: the rows hold messages, but this tokenizer has no chat template; "
                "give text rows or add a chat_template.jinja to the model's folder"
            )
        given: Any = {**self.given, **flags}
        try:
            messages = spelled(messages, self.tokenizer, tools=given.get("tools"))
            return rendered(self.tokenizer, messages, **given)
        except Unrendered as error:
            name = self.tokenizer.name_or_path
            raise RowError(f"{name}: the chat template refuses the conversation ({error}); mend the row") from None


def _is_finished(completion: Text) -> bool:
    """Whether a completion begins with another's message, so that one of the assistant's before it is over."""
    return not isinstance(completion, str) and completion[0]["role"] != "assistant"
