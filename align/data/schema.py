"""The row that every format becomes, and the checks that a row passes on its way in."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal

from align.data.bad_row import BadRow, kind
from align.data.messages import Message, conversation
from align.errors import UserError
from align.progress import counted

Text = str | list[Message] | list[int]
Repeated = Literal["cut", "kept"]

ATTRIBUTES = "attributes"
"""Column of a row's ratings under several names: an object per completion."""
LEFT_OUT = "left_out"
"""What a row's `meta` calls the number of answers to its prompt that it does not have."""
TEMPLATE_OPTIONS = "chat_template_kwargs"
"""Column of what a row gives the chat template, as TRL names it."""
OWN_ARGUMENTS = frozenset(
    (
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
    )
    + ("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask")
    + ("tokenizer_kwargs",)
)
"""What such a column cannot set: arguments of `apply_chat_template` that say how a row is read at all."""
JSON_MESSAGES = re.compile(
    r"""\s*\[\s*\{\s*(['"])(role|content|from|value)\1\s*:"""
    r"""|\s*\{\s*(['"])(role|from)\3\s*:\s*(['"])(system|user|human|assistant|gpt)\5"""
)
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")


@dataclass(frozen=True)
class Row:
    """One prompt with its completions; prompt and completions are all text, all messages or all token ids."""

    id: str
    prompt: Text
    completions: tuple[Text, ...]
    """In a conversation each is a list of messages, one of them at least the assistant's."""
    grades: tuple[float, ...] | None
    """Larger is better."""
    rewards: tuple[float, ...] | None
    """What a scorer, a rater or a ranking gave, larger is better; not yet grades."""
    meta: dict[str, Any]
    """The columns that no reader uses."""
    source: str
    """The file, or the hub name."""
    number: int
    """Its place in the source, from 1; the line number in a JSONL file."""
    weight: float = 1.0
    """Relative share of its source in the mixture."""
    loss_weight: float = 1.0
    """How often the row itself counts in a step; 0 is its absence."""
    margin: float | None = None
    """How far apart its pairs should score; None where it does not say."""
    token_weights: tuple[tuple[float, ...], ...] | None = None
    """How much every completion token counts; in rows of token ids only."""
    prompt_ids: list[int] | None = None
    """The token ids that a policy read when it wrote the completions; then nothing is tokenised again."""
    completion_ids: tuple[list[int], ...] | None = None
    """The token ids that it wrote, end token included; there where `prompt_ids` are."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """What the row gives the chat template besides its messages, such as `enable_thinking`."""
    tools: list[dict[str, Any]] | None = None
    """OpenAI's function schemas that the chat template is given."""
    unread: tuple[str, ...] = ()
    """The columns that no reader uses, and `items[].model` for a key of a list's objects."""
    repeated: Repeated | None = None
    """Whether all completions began with the prompt, and whether they lost it."""
    gathered: bool = False
    """Whether it was made of neighbouring rows or of one that held several lists, so that any number of completions is
    right."""

    @property
    def place(self) -> str:
        """Where it was read, for messages."""
        return f"{self.source}, row {self.number}"

    @property
    def template_arguments(self) -> dict[str, Any]:
        """All that the chat template is given besides the messages: the options, and the tools where there are any."""
        return {**self.template_options, "tools": self.tools} if self.tools else self.template_options


def row_of(values: dict[str, Any]) -> Row:
    """A row of all of its fields; a frozen class's own way sets one after the other, which takes five times as long."""
    row = object.__new__(Row)
    row.__dict__.update(values)
    return row


def changed(row: Row, **fields: Any) -> Row:
    """The row with other values of some fields, as `dataclasses.replace` makes it and faster."""
    return row_of(row.__dict__ | fields)


class UnusableRow(ValueError):
    """A well-formed row that nothing can be learnt from; its argument is the reason that is counted."""


class Malformed:
    """The malformed rows of a source: what the first one's message is, and how many there are."""

    def __init__(self) -> None:
        self.first, self.count = "", 0

    def add(self, message: str) -> None:
        """One more."""
        self.first = self.first or message
        self.count += 1

    def check(self) -> None:
        """Raise the one error for all of them, if there is any."""
        if self.count:
            raise malformed([self.first] * self.count)


def malformed(messages: Sequence[str]) -> UserError:
    """One error for all malformed rows of a source: the first one's message, and how many more there are."""
    more = f" (and {counted(len(messages) - 1, 'more malformed row')})" if len(messages) > 1 else ""
    return UserError(messages[0] + more)


def check_characters(value: object, field: str | None = None) -> None:
    """Refuse text that is no valid Unicode, which no tokenizer takes and no file can hold.

    Args:
        value: a row, or whatever a column holds.
        field: its name, for the message.

    Raises:
        BadRow: a text, or an object's key, has a lone surrogate; the message names the field and never shows it.
    """
    if isinstance(value, str):
        if not _is_unicode(value):
            raise BadRow(field, "holds half a character (a lone surrogate)", "mend the text")
    elif _holds_unicode(value):  # without the names of fields, which take most of the time
        return
    elif isinstance(value, dict):
        for name, own in value.items():
            check_characters(name, f"{field or 'a column'}'s name")
            check_characters(own, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list | tuple) and not is_token_ids(value):
        for k, own in enumerate(value):
            check_characters(own, f"{field}[{k}]")


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _holds_unicode(value: object) -> bool:
    """Whether all texts and all keys are valid, however deep."""
    if isinstance(value, str):
        return value.isascii() or _is_unicode(value)
    if isinstance(value, dict):
        return all(map(_holds_unicode, value)) and all(map(_holds_unicode, value.values()))
    return not isinstance(value, list | tuple) or is_token_ids(value) or all(map(_holds_unicode, value))


def make_row(
    *,
    id: object,
    prompt: object,
    completions: object,
    grades: object,
    rewards: object,
    meta: dict[str, Any],
    source: str,
    number: int,
    prompt_ids: object = None,
    completion_ids: object = None,
) -> Row:
    """A checked row; a conversation wherever the prompt or a completion is one.

    Args:
        id: text or a number; None for a name made of source and number.
        prompt: text, messages or token ids.
        completions: a list of texts, messages (one each) or lists of token ids.
        grades: numbers, one per completion, or None.
        rewards: likewise.
        meta: columns to keep.
        source: the file it comes from.
        number: its place there, from 1.
        prompt_ids: the prompt's token ids where a policy sampled the completions, else None.
        completion_ids: a list of those of each completion; with `prompt_ids` or not at all.

    Returns:
        The row.

    Raises:
        BadRow: a field is missing, of the wrong type, empty, not finite or of the wrong length.
    """
    checked_prompt = _prompt(prompt)
    if not isinstance(completions, list | tuple):
        raise BadRow("completions", f"{kind(completions)}, not a list", "give a list with one entry per completion")
    if not completions:
        raise BadRow("completions", "an empty list", "give at least one completion, or remove the row")
    checked = [_completion(entry, f"completions[{k}]") for k, entry in enumerate(completions)]
    checked_prompt, checked = _same_kind(checked_prompt, checked)
    return Row(
        id=f"{source}:{number}" if id is None else str(id),
        prompt=checked_prompt,
        completions=tuple(checked),
        grades=None if grades is None else numbers(grades, "grades", len(checked)),
        rewards=None if rewards is None else numbers(rewards, "rewards", len(checked)),
        meta=meta,
        source=source,
        number=number,
        **_sampled_ids(prompt_ids, completion_ids, len(checked)),
    )


def numbers(values: object, field: str, count: int) -> tuple[float, ...]:
    """Finite numbers, `count` of them.

    Raises:
        BadRow: not a list, of another length, or an entry that is no finite number.
    """
    if not isinstance(values, list | tuple):
        raise BadRow(field, f"{kind(values)}, not a list of numbers", "give one number per completion")
    if len(values) != count:
        raise BadRow(field, f"{len(values)} entries for {count} completions", "give one number per completion")
    return tuple(number(value, f"{field}[{k}]") for k, value in enumerate(values))


def weights_of_tokens(values: object, completions: Sequence[Text]) -> tuple[tuple[float, ...], ...]:
    """A number for each token of each completion.

    Raises:
        BadRow: the completions are not token ids, or the numbers are not as many.
    """
    if not all(is_token_ids(ids) for ids in completions):
        raise BadRow("token_weights", "beside text", "give the row as `prompt_ids` and `completion_ids`")
    if not isinstance(values, list | tuple) or len(values) != len(completions):
        raise BadRow("token_weights", "not one list per completion", "give a list of numbers for each completion")
    pairs = zip(values, completions, strict=True)
    return tuple(_per_token(own, f"token_weights[{k}]", len(ids)) for k, (own, ids) in enumerate(pairs))


def _per_token(values: object, field: str, count: int) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or len(values) != count:
        got = len(values) if isinstance(values, list | tuple) else kind(values)
        raise BadRow(field, f"{got} entries for {count} tokens", "give one number per token")
    return tuple(number(value, f"{field}[{t}]") for t, value in enumerate(values))


def template_options(value: object) -> dict[str, Any]:
    """What a row gives the chat template; entries of null are absent ones, which Parquet writes so.

    Raises:
        BadRow: no object, or an entry that only a recipe may set.
    """
    if not isinstance(value, dict):
        raise BadRow(TEMPLATE_OPTIONS, f"{kind(value)}, not an object", "give an object of the template's own options")
    options = {name: own for name, own in value.items() if own is not None}
    for name in options.keys() & OWN_ARGUMENTS:
        remedy = "set `policy.chat_template` in the recipe" if name == "chat_template" else "remove it from the rows"
        raise BadRow(f"{TEMPLATE_OPTIONS}.{name}", "not an option of the template's own", remedy)
    return options


def number(value: object, field: str) -> float:
    """One finite number; a boolean is none.

    Raises:
        BadRow: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(field, f"{kind(value)}, not a number", "give a number, larger for a better completion")
    if not is_finite(value):
        problem = f"the value is {value}" if isinstance(value, float) else "a number beyond float64"
        raise BadRow(field, problem, "give a finite number, or remove the completion")
    return float(value)


def is_finite(value: int | float) -> bool:
    """Whether it is a finite number that float64 holds."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_messages(value: object) -> bool:
    """Whether it is a non-empty list of objects, as a conversation is."""
    return isinstance(value, list) and bool(value) and all(map(isinstance, value, repeat(dict)))


def is_token_ids(value: object) -> bool:
    """Whether it is a non-empty list of whole numbers."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    )


def _sampled_ids(prompt_ids: object, completion_ids: object, count: int) -> dict[str, Any]:
    if prompt_ids is None and completion_ids is None:
        return {}
    if not is_token_ids(prompt_ids):
        raise BadRow("prompt_ids", f"{kind(prompt_ids)}, not token ids", "give them beside completion_ids")
    if not isinstance(completion_ids, list) or not all(is_token_ids(ids) for ids in completion_ids):
        raise BadRow("completion_ids", "not a list of lists of token ids", "give one or more ids for each completion")
    if len(completion_ids) != count:
        raise BadRow("completion_ids", f"{len(completion_ids)} entries for {count} completions", "give one each")
    checked = tuple(_token_ids(ids, f"completion_ids[{k}]") for k, ids in enumerate(completion_ids))
    return {"prompt_ids": _token_ids(prompt_ids, "prompt_ids"), "completion_ids": checked}  # type: ignore[arg-type]


def _prompt(value: object) -> Text:
    if value is None:
        raise BadRow("prompt", "missing", "give a `prompt` (text or messages)")
    if value in ("", []) or (isinstance(value, str) and not value.strip()):
        raise BadRow("prompt", "empty", "give at least the tokenizer's start token as text, or remove the row")
    text = _text(value, "prompt")
    if not is_messages(text):
        return text
    messages: list[Message] = text  # type: ignore[assignment]
    weights = {k: message["weight"] for k, message in enumerate(messages) if "weight" in message}
    if not weights:
        return text
    for k, weight in weights.items():
        if weight:
            raise BadRow(f"prompt[{k}].weight", "a weight in a prompt, which is not learnt", "remove it")
    return [{key: own for key, own in message.items() if key != "weight"} for message in messages]


def _completion(value: object, field: str) -> Text:
    if isinstance(value, dict):
        value = [value]
    if value == []:
        raise BadRow(field, "an empty list", "give text, or an assistant's message")
    text = _text(value, field)
    if not is_messages(text):
        return text
    messages: list[Message] = text  # type: ignore[assignment]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in messages)
        raise BadRow(field, f"messages of {roles}", "give one assistant message, and earlier turns in the prompt")
    if not any(message.get("weight", 1) for message in answers):
        raise BadRow(field, "every message of the assistant's has the weight 0", "nothing is learnt; remove the row")
    return text


def _text(value: object, field: str) -> Text:
    if isinstance(value, str):
        if JSON_MESSAGES.match(value):
            raise BadRow(field, "a conversation written as text", "give it as a list of messages, not as its JSON")
        return value
    if is_token_ids(value):
        return _token_ids(value, field)  # type: ignore[arg-type]
    if is_messages(value):
        return conversation(value, field)  # type: ignore[arg-type]
    raise BadRow(field, f"{kind(value)}, not text, messages or token ids", "give text or a list of messages")


def _token_ids(ids: Sequence[int], field: str) -> list[int]:
    if min(ids) < 0 or max(ids) > 2**31 - 1:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise BadRow(field, f"{wrong} is no token id", "give ids of the model's own tokenizer")
    return list(ids)


def _same_kind(prompt: Text, completions: list[Text]) -> tuple[Text, list[Text]]:
    kinds = {_form(text) for text in (prompt, *completions)}
    if kinds == {"text", "messages"}:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return prompt, [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
    if len(kinds) > 1:
        raise BadRow("completions", "token ids beside text", "give prompt and completions both as token ids or as text")
    return prompt, completions


def _form(text: Text) -> str:
    if isinstance(text, str):
        return "text"
    return "messages" if is_messages(text) else "token ids"
