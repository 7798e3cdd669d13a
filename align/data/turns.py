"""Of a completion of several messages, what the assistant wrote, where that stands as generation saw it."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from align.data.boundary import Tokens
from align.data.schema import Message
from align.data.texts import Template
from rewards.templates import TAG, start_text, with_message

Learn = Literal["assistant", "completion", "last"]
Span = tuple[int, int, float]
"""Of a text the first character that is learnt, the first behind it that is not, and the weight."""

ENDS = re.compile(rf"(?:\s*(?:{TAG}))*\s*")
"""What a template may leave out of its own marks: the end of the turn."""


OTHER_TEMPLATE = "set `policy.chat_template` to one that leaves earlier turns as they were generated"


class RewrittenTurn(ValueError):
    """A message that does not stand in the whole conversation as it was generated."""

    def __init__(self, problem: str, *, is_last: bool) -> None:
        super().__init__(problem)
        as_context = "" if is_last else "set `data.learn: last`, give that message `weight: 0`, or "
        self.remedy = as_context + OTHER_TEMPLATE


class UnlearntWeight(ValueError):
    """A message's weight for which `data.learn` has no place."""

    remedy = "set `data.learn: assistant`, which counts the messages' weights, or mend the row"


@dataclass
class Conversation:
    """A prompt with one completion of several messages, as the template writes it."""

    messages: list[Message]
    """Without what a message brings and the template writes too."""
    first: int
    """Place of the completion's first message; the prompt's last where that is continued."""
    text: str = ""
    spans: list[Span] = field(default_factory=list)
    """What is learnt of the text."""
    heads: int = 0
    """Messages that began as their prompt ends."""
    ends: int = 0
    """Messages that brought an end-of-turn token of their own."""
    marks_differ: bool = False
    """Whether the template's `{% generation %}` marks say otherwise."""


def has_turns(completion: Sequence[Message]) -> bool:
    """Whether a completion is more than one message that is learnt whole."""
    return len(completion) > 1 or completion[0].get("weight", 1) != 1


def conversation_of(
    prompt: list[Message], completion: Sequence[Message], template: Template, special: Tokens, learn: Learn | None
) -> Conversation:
    """The whole text of a conversation, and which of its characters are learnt.

    Learnt are, of each assistant message of the completion, the characters from the end of the prompt that it was
    generated from (all earlier messages with the generation prompt) to the end of its turn, end token included. White
    space behind that token is context. A template without an end of turn has generation stop at the special token that
    opens the next turn: then this one is learnt.

    Args:
        prompt: messages; where the last is the assistant's, a completion that begins with one of the assistant's goes
            on in it.
        completion: messages.
        template: with the row's options.
        special: the tokenizer's.
        learn: which messages; None for none, as a reward model reads a conversation.

    Raises:
        RewrittenTurn: a message is learnt and the template writes it, or what stands before it, otherwise as soon as
            later messages follow.
        ValueError: the template refuses the conversation, or no message is left to learn.

    Source: ours
    """
    weights = _weights(completion, learn)
    joined = prompt[-1]["role"] == completion[0]["role"] == "assistant"
    own = Conversation(list(prompt), len(prompt) - joined)
    before = [
        _add(own, message, template, special, joined=joined and place == 0, learnt=weights[place] > 0)
        for place, message in enumerate(completion)
    ]
    own.text = template.apply(own.messages)
    last = max(place for place, message in enumerate(completion) if message["role"] == "assistant")
    for place, weight in enumerate(weights):
        if weight:
            stop = own.first + place + 1
            own.spans.append((*_span(own, stop, before[place], template, special, is_last=place == last), weight))
    own.marks_differ = bool(own.spans) and _marks_differ(own, template)
    return own


def _weights(completion: Sequence[Message], learn: Learn | None) -> list[float]:
    """How much each message counts; 0 for one that is not learnt."""
    weights = [float(own.get("weight", 1)) if own["role"] == "assistant" else 0.0 for own in completion]
    if learn == "completion" and any(own.get("weight", 1) != 1 for own in completion):
        raise UnlearntWeight("a message has a `weight`, and `data.learn: completion` learns every token alike")
    if learn is None or learn == "completion":
        return [0.0] * len(completion)
    if learn == "last":
        last = max(place for place, own in enumerate(completion) if own["role"] == "assistant")
        weights = [weight if place == last else 0.0 for place, weight in enumerate(weights)]
    if not any(weights):
        raise UnlearntWeight("the last assistant message has the weight 0, and `data.learn: last` learns nothing else")
    return weights


def _add(
    own: Conversation, message: Message, template: Template, special: Tokens, *, joined: bool, learnt: bool
) -> str:
    """Add a message; if it is learnt, the text that it was generated from."""
    before = template.before_answer(own.messages, joined=joined) if learnt else ""

    def before_again(messages: list[Message]) -> str:
        return before or template.before_answer(messages, joined=joined)

    bos = start_text(template.tokenizer)
    own.messages, head, end = with_message(
        own.messages, message, bos, special.tags, before_again, template.apply, joined=joined
    )
    own.heads += head
    own.ends += end
    return before


def _span(
    own: Conversation, stop: int, before: str, template: Template, special: Tokens, *, is_last: bool
) -> tuple[int, int]:
    """The first character of a message that is learnt, and the first behind it that is not.

    The last message is held to less: a generation prompt that begins what the text does not go on with (`<think>`) is
    cut where the two part, as it is in a completion of one message.
    """
    text, messages = own.text, own.messages
    alone = text if stop == len(messages) else template.apply(messages[:stop])
    bare = alone.rstrip()
    if not text.startswith(bare):  # perhaps for the end token behind a whole conversation, which no other turn has
        turn = bare.removesuffix(str(template.tokenizer.eos_token)).rstrip()
        bare = turn if turn.endswith(special.specials) else bare
    begin = f"{messages[stop - 1]['content'][:40]!r} ..."
    place = f"message {stop - own.first} of a completion (assistant, {begin})"
    if not text.startswith(bare):
        raise RewrittenTurn(f"{place}: the chat template writes it otherwise once others follow", is_last=is_last)
    start = len(before)
    if not text.startswith(before):
        earlier = messages[: stop - 1]
        opened = template.apply(earlier).rstrip() if is_last and earlier else ""
        if not is_last or not text.startswith(opened):
            problem = f"{place}: the chat template writes what it was generated from otherwise beside it"
            raise RewrittenTurn(problem, is_last=is_last)
        start = len(os.path.commonprefix([before, text]))
    if bare.endswith(special.specials):
        return start, len(bare)
    end = len(alone) if text.startswith(alone) else len(bare)
    opens = re.compile(TAG).match(text, end)
    return start, (opens.end() if opens and opens[0] in special.specials else end)


def _marks_differ(own: Conversation, template: Template) -> bool:
    """Whether the template marks other characters as generated, but for white space and what ends a turn."""
    marks = template.marks(own.messages)
    if marks is None:
        return False
    for start, end, _ in own.spans:
        inside = [(a, b) for a, b in marks if a < end and b > start]
        begins = min((a for a, _ in inside), default=end)
        stops = max((b for _, b in inside), default=start)
        gaps = [own.text[b:a] for (_, b), (a, _) in zip(inside, inside[1:], strict=False)]
        around = own.text[begins:start], own.text[start:begins], own.text[end:stops]
        if any(text.strip() for text in (*around, *gaps)) or not ENDS.fullmatch(own.text[stops:end]):
            return True
    return False
