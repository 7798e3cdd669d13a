"""Which columns a row may bring that no reader uses: nothing that looks like a part of the preference."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from align.data.schema import BadRow, is_messages

Columns = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of a preference, the words by which a column's name tells it, and what to do about such a column."""

    what: str
    words: frozenset[str]
    remedy: str
    plain: bool = False
    """Whether a number or a truth value may be one too; else it has to hold text."""


def _part(what: str, words: str, remedy: str, *, plain: bool = False) -> Part:
    return Part(what, _words(words), remedy, plain)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PROMPT = _part(
    "the prompt",
    "prompt prompts question questions query queries instruction instructions input inputs context contexts ctx "
    "problem problems history histories conversation conversations dialogue dialogues dialog dialogs message messages "
    "turns passage passages document documents docs background prefix contents",
    "put all of the prompt in one column, `prompt`",
)
WEIGHT = _part("a weight", "weight weights", "give the row's weight in a column `weight`", plain=True)
LABEL = _part(
    "a label",
    "label labels kto desirable undesirable preference preferences winner winners better safer vote thumbs accepted",
    "a pair is `chosen` and `rejected`; a lone completion has a `label`, true or false",
    plain=True,
)
COMPLETION = _part(
    "a completion",
    "chosen rejected response responses completion completions output outputs candidate candidates generation "
    "generations preferred dispreferred reply replies assistant items loser reject",
    "give `completions` with `grades`, or `chosen` and `rejected`",
)
OPTION = _part(
    "an option of the chat template",
    "enable effort kwargs",
    "put a row's own options in `chat_template_kwargs`",
    plain=True,
)
THOUGHTS = _part(
    "the model's thoughts",
    "thinking thought thoughts reasoning cot",
    "put them in the `reasoning_content` of the message that they led to",
)
TOOLS_OF_ONE = _part(
    "tools of one side (both share the prompt that holds them)",
    "tool tools function functions",
    "give the tools that all completions have in `tools`",
)
PARTS = (
    _part("tools", "tool tools function functions", "give the tools that all completions have in `tools`"),
    _part(
        "images, audio or video",
        "image images video videos audio audios pixel img imgs picture pictures photo photos screenshot screenshots",
        "they are not supported",
    ),
    OPTION,
    _part("the chat template", "template", "set `policy.chat_template`"),
    WEIGHT,
    LABEL,
    COMPLETION,
    _part(
        "a system text",
        "system sys sysmsg persona preamble developer",
        "put it in `system`, or at the start of the prompt",
    ),
    PROMPT,
    THOUGHTS,
)
SIDES = _words("chosen rejected preferred dispreferred better worse completion response")
OF_COMPLETIONS = (WEIGHT, LABEL, COMPLETION, THOUGHTS)
TRUTHS = {COMPLETION: LABEL, THOUGHTS: OPTION}
"""What a part's name means where true or false stands there."""
FACTS_LAST = _words(
    "id ids uid uuid idx index hash length lengths len tokens count model models source sources type types kind lang "
    "language url urls date time timestamp split version dataset name names category categories subset topic task "
    "domain difficulty score scores rating ratings reward rewards rank ranks logprob logprobs quality status"
)
"""A name that ends so tells something about the part that it names."""
FACTS = _words(
    "id ids labelling labeling labeller annotator annotation annotations judge critique critiques rationale "
    "explanation reference references ground gold correct incorrect expected given num metadata"
)
"""A name with such a word is of what others said or know about the row."""
MARKS = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|\n\nHuman:|### Instruction")
"""What only a rendered conversation holds."""
AGAINST = _words("rejected loser worse bad tie tied both neither")
"""Words of a label that deny the order which the row's completions have; where they come from (`model_a`) does not."""
WHICH = _words("winner winners better safer preference preferences vote")
"""A label with such a word names the better one of several."""
PLAIN = re.compile(r"[\w.-]+")
"""A column's name that needs no quotes, neither in YAML nor in a shell."""
LISTED = re.compile(r"\s*[\[{]\s*[^\]}\s]")
"""What a list or an object begins with that is written as text and holds something."""
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]{2}")
"""Two letters of a script that sets no spaces between words."""


def check_unread(
    unread: Columns,
    used: Iterable[str],
    *,
    ordered: bool,
    prompt_is_guessed: bool = False,
    prompt_alone: bool = False,
) -> None:
    """Refuse a row that leaves unread what belongs to a preference by its name or its content.

    A column whose texts are all among those that were read is a copy, and may stay unread; so may what is called a
    label beside completions that have an order of their own, if it is no verdict on them.

    Args:
        unread: the columns that no reader has used, by the name that a user knows them by.
        used: the texts that were read.
        ordered: whether grades, rewards or sides were read.
        prompt_is_guessed: whether the prompt is only what two texts have in common; then no sentence may stay unread.
        prompt_alone: whether the completions do not count.

    Raises:
        BadRow: names all such columns and the remedy.
    """
    suspects = {name: part for name, value in unread.items() if (part := _part_of(name, value, prompt_is_guessed))}
    if prompt_alone:
        suspects = {name: part for name, part in suspects.items() if part not in OF_COMPLETIONS}
    if not suspects:
        return
    everything = "\n".join(used)
    lost = [name for name, part in suspects.items() if _is_lost(name, part, unread[name], everything, ordered)]
    if not lost:
        return
    part = suspects[lost[0]]
    others = f" (and so are {', '.join(lost[1:])})" if len(lost) > 1 else ""
    problem = f"it looks like {part.what} and would stay unread{others}"
    raise BadRow(lost[0], problem, f"{part.remedy}, or {how_to_ignore(*lost)}")


def how_to_ignore(*names: str) -> str:
    """What a user types to leave columns out, in a recipe and on the command lines that have none; `items[].system` in
    the quotes that YAML and a shell want.
    """
    listed = ",".join(name if PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False) for name in names)
    ignore = f"data.ignore=[{listed}]" if all(map(PLAIN.fullmatch, names)) else shlex.quote(f"data.ignore=[{listed}]")
    return f"leave it out with {ignore} (without a recipe --ignore {' --ignore '.join(map(shlex.quote, names))})"


def without(columns: Columns, ignored: Iterable[str]) -> Columns:
    """The columns but for those to ignore; `completions[].model` names a key of a list's objects."""
    kept = dict(columns)
    for name in ignored:
        column, _, key = name.partition("[].")
        if not key or name in kept:  # a mapping leaves columns of such a name
            kept.pop(name, None)
        elif column in kept:
            kept[column] = _without_key(kept[column], key)
    return kept


def _without_key(value: object, key: str) -> Any:
    """An object, or all objects of a list or of a list of lists, but for a key."""
    if isinstance(value, dict):
        return {name: own for name, own in value.items() if name != key}
    return [_without_key(own, key) for own in value] if isinstance(value, list) else value


def texts_in(value: object) -> Iterator[str]:
    """Every text in a column, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from texts_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from texts_in(entry)


def _part_of(name: str, value: object, prompt_is_guessed: bool) -> Part | None:
    """The part of a preference that a column looks like, if any."""
    part = _named(name)
    if isinstance(value, bool) and part in TRUTHS:
        return TRUTHS[part]
    texts = [text for text in texts_in(value) if text.strip()]
    if part is PROMPT and isinstance(value, str) and not _is_sentence(value) and not _is_input(name):
        return PROMPT if LISTED.match(value) else None  # else a slug or a key
    if part is not None and (texts or (part.plain and value not in (None, [], {}, ""))):
        return part
    if FACTS & _words_of_name(name).keys():
        return None
    if _is_conversation(value) or any(MARKS.search(text) for text in texts):
        return PROMPT
    if prompt_is_guessed and not _is_fact(name) and any(map(_is_sentence, texts)):
        return PROMPT
    return None


def _is_sentence(text: str) -> bool:
    return len(text.split()) > 1 or UNSPACED.search(text) is not None


def _is_input(name: str) -> bool:
    """Whether a column holds what an instruction is applied to, which may be one word."""
    return "input" in _words_of_name(name)


@lru_cache(maxsize=4096)
def _named(name: str) -> Part | None:
    if _is_fact(name):
        return None
    words = _words_of_name(name)
    if TOOLS_OF_ONE.words & words.keys() and SIDES & words.keys():
        return TOOLS_OF_ONE
    return next((part for part in PARTS if part.words & words.keys()), None)


@lru_cache(maxsize=4096)
def _is_fact(name: str) -> bool:
    words = _words_of_name(name)
    return not words or bool(FACTS & words.keys()) or [*words][-1] in FACTS_LAST


def _words_of_name(name: str) -> dict[str, None]:
    """The words of a column's name in their order: custom_system_prompt, customSystemPrompt, `items[].system`."""
    return dict.fromkeys(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name.split("[].")[-1]))


def _is_conversation(value: object) -> bool:
    return is_messages(value) and any(  # type: ignore[union-attr]
        {"role", "content"} <= entry.keys() or {"from", "value"} <= entry.keys()
        for entry in value  # type: ignore[attr-defined]
    )


def _is_lost(name: str, part: Part, value: object, everything: str, ordered: bool) -> bool:
    if part is LABEL:
        return not ordered or _is_verdict(name, value)
    return part.plain or not _is_copy(value, everything)


def _is_verdict(name: str, value: object) -> bool:
    """Whether a label may say that another completion is better: by a word, by a number that is false, or by any number
    where the name asks which one it is. Else a number is where the better one stood in the source, as in LLMBar.
    """
    if isinstance(value, int | float):
        return isinstance(value, bool) or value <= 0 or bool(WHICH & _words_of_name(name).keys())
    return isinstance(value, str) and value.strip().casefold() in AGAINST


def _is_copy(value: object, everything: str) -> bool:
    if is_messages(value):
        value = [entry.get("content", entry.get("value")) or list(entry.values()) for entry in value]  # type: ignore[attr-defined]
    return all(text.strip() in everything for text in texts_in(value))
