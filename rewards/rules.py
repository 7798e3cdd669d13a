"""Rewards by rule: no model, one completion at a time; each is a configuration and the function that applies it."""

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import regex
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from align.section import Strict
from rewards.texts import plain
from rewards.types import SCORER, RowError, ScorerError, Tally, Text

NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d+)?(?:[eE][+-]?\d+)?")
ANSWER_MARKS = (r"\\boxed\{([^{}]*)\}", r"####\s*(.+)", r"(?i)answer(?: is|:)\s*(.+)")
"""Where a completion states its answer, the surest first."""
SEARCH = 2
"""Seconds for a pattern in a completion, since rows may bring patterns of their own."""


class _Rule:
    """Applies a function to each prompt and completion."""

    def __init__(self, rule: Callable[[Text, Text], float]) -> None:
        self._rule = rule
        self.tally = Tally()

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """The rule's number for each completion; see Scorer.score."""
        self.tally.completions += len(prompts)
        return [self._rule(prompt, own) for prompt, own in zip(prompts, completions, strict=True)]


class _AnswerScorer:
    def __init__(self, right: Callable[[str, str], bool]) -> None:
        self._right = right
        self.tally = Tally()

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], answers: Sequence[Any]) -> list[float]:
        """1.0 or 0.0; see ReferenceScorer.score."""
        self.tally.completions += len(prompts)
        return [float(self._right(plain(own), str(answer))) for own, answer in zip(completions, answers, strict=True)]


@SCORER.add
class Length(Strict):
    """1 for a completion whose length is within bounds, else 0."""

    scorer: ClassVar = "rules:length_scorer"
    name: Literal["length"] = "length"
    unit: Literal["words", "characters"] = "words"
    min: NonNegativeInt = 0
    max: PositiveInt | None = None

    @model_validator(mode="after")
    def _bounds(self) -> "Length":
        if not self.min and self.max is None or self.max is not None and self.max < self.min:
            raise ValueError(
                f"length: from {self.min} to {self.max} bounds nothing; give `min`, a larger `max` or both"
            )
        return self


def length_scorer(*, unit: str, min: int, max: int | None) -> _Rule:
    """See `Length`; words are what white space separates."""

    def within(_: Text, completion: Text) -> float:
        text = plain(completion)
        size = len(text.split()) if unit == "words" else len(text)
        return float(min <= size <= (math.inf if max is None else max))

    return _Rule(within)


@SCORER.add
class Format(Strict):
    """1 for a completion of the given form, else 0."""

    scorer: ClassVar = "rules:format_scorer"
    name: Literal["format"] = "format"
    json_object: bool = False
    """The whole completion is one JSON object."""
    tags: tuple[str, ...] = ()
    """The whole completion is these tags in this order, each opened and closed once: <think>...</think> for `think`."""

    @model_validator(mode="after")
    def _one_form(self) -> "Format":
        if self.json_object == bool(self.tags):
            raise ValueError("format: give one of `json_object: true` and `tags`")
        return self


def format_scorer(*, json_object: bool, tags: Sequence[str]) -> _Rule:
    """See `Format`."""
    pattern = r"\s*".join(f"<{re.escape(tag)}>(?:(?!</?{re.escape(tag)}>).)*</{re.escape(tag)}>" for tag in tags)

    def formed(_: Text, completion: Text) -> float:
        text = plain(completion).strip()
        return float(_is_json_object(text) if json_object else bool(re.fullmatch(pattern, text, re.DOTALL)))

    return _Rule(formed)


@SCORER.add
class Pattern(Strict):
    """1 for a completion that a regular expression matches, else 0."""

    scorer: ClassVar = "rules:pattern_scorer"
    name: Literal["regex"] = "regex"
    pattern: str
    """Python's syntax; `.` does not match line ends unless the pattern says (?s)."""
    whole: bool = False
    """It must match the whole completion, white space around it aside; by default a part is enough."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            regex.compile(value)
        except regex.error as error:
            raise ValueError(f"{value!r} is no regular expression ({error})") from None
        return value


def pattern_scorer(*, pattern: str, whole: bool) -> _Rule:
    """See `Pattern`."""
    compiled = regex.compile(pattern)  # re's syntax, and unlike re it stops in time

    def matches(_: Text, completion: Text) -> float:
        text = plain(completion)
        try:
            found = compiled.fullmatch(text.strip(), timeout=SEARCH) if whole else compiled.search(text, timeout=SEARCH)
        except TimeoutError:
            raise RowError(
                f"regex: {pattern!r} was not through with a completion of {len(text)} characters in {SEARCH} s; "
                "write one without a repetition of repetitions"
            ) from None
        return float(bool(found))

    return _Rule(matches)


@SCORER.add
class Answer(Strict):
    """1 for a completion that gives the row's reference answer, else 0."""

    scorer: ClassVar = "rules:answer_scorer"
    name: Literal["answer"] = "answer"
    answer_column: str = "answer"
    """The column that holds the reference answer."""
    kind: Literal["exact", "numeric"] = "exact"
    """exact: the same text but for case, white space and a final point; numeric: the same number."""
    pattern: str | None = None
    """A regular expression whose first group is the completion's answer; by default the last \\boxed{...}, `#### ...`
    or "answer is ...", else the whole text (exact) or its last number (numeric)."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-6
    """By how much two numbers may differ, relative to the reference answer."""

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, value: str | None) -> str | None:
        try:
            groups = 1 if value is None else re.compile(value).groups
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression ({error})") from None
        if not groups:
            raise ValueError(f"{value!r} has no group; put the answer's part in brackets")
        return value


def answer_scorer(*, answer_column: str, kind: str, pattern: str | None, tolerance: float) -> _AnswerScorer:
    """See `Answer`; a completion without an answer is wrong, a reference answer without a number is refused."""

    def right(completion: str, answer: str) -> bool:
        if kind == "exact":
            return _normal(_stated(completion, pattern) or "") == _normal(answer)
        expected = _number(_stated(answer, None) or answer)
        if expected is None:
            raise RowError(f"the reference answer {answer!r} in column {answer_column} holds no number")
        found = _number(_stated(completion, pattern) or "")
        return found is not None and abs(found - expected) <= tolerance * abs(expected)

    return _AnswerScorer(right)


@SCORER.add
class Constraints(Strict):
    """The share that a completion keeps of the rules that its row brings, such as
    `[{"name": "length", "max": 80}, {"name": "regex", "pattern": "(?i)thanks"}]`."""

    scorer: ClassVar = "constraints:ConstraintsScorer"
    name: Literal["constraints"] = "constraints"
    answer_column: str = "constraints"
    """The column that holds them: the JSON text of a list of `length`, `format` and `regex`, with their options."""


@SCORER.add
class Function(Strict):
    """A function of yours: module:function, called with a prompt and a completion."""

    scorer: ClassVar = "rules:function_scorer"
    name: Literal["python"] = "python"
    function: str
    """Such as `my_rewards:politeness`, found from the current folder or among installed packages; gives a number."""

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.]+:\w+", value):
            raise ValueError(f"{value!r} is not of the form module:function")
        return value


def function_scorer(*, function: str) -> _Rule:
    """See `Function`.

    Raises:
        ScorerError: there is no such module or function.
    """
    module, name = function.split(":")
    if "" not in sys.path:
        sys.path.append("")  # the current folder, which a console script does not look into
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ScorerError(f"{function}: no such function ({error}); name it module:function") from None

    return _own_rule(found, function)


def scorer_of(own: Any) -> Any:
    """A scorer that is an object: one with `score(prompts, completions)` as it is, or a function of both.

    Raises:
        ScorerError: it is neither.
    """
    if own is None or callable(getattr(own, "score", None)):
        return own
    if not callable(own):
        raise ScorerError(
            f"scorer: {type(own).__name__} scores nothing; give a function (prompt, completion) -> number, or what "
            "rewards.load_scorer returns"
        )
    return _own_rule(own, getattr(own, "__name__", "scorer"))


def _own_rule(function: Callable[..., Any], name: str) -> _Rule:
    def call(prompt: Text, completion: Text) -> float:
        try:
            return float(function(prompt, completion))
        except Exception as error:
            raise RowError(f"{name}: {type(error).__name__}: {error}") from error

    return _Rule(call)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _stated(text: str, pattern: str | None) -> str | None:
    """The answer that a text states; the whole text where no mark tells, None where a given pattern does not match."""
    if pattern is not None:
        match = list(re.finditer(pattern, text))
        return match[-1][1] if match else None
    for mark in ANSWER_MARKS:
        found = re.findall(mark, text)
        if found:
            return str(found[-1])
    return text


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").strip()


def _number(text: str) -> Fraction | None:
    """The last number of a text; thousands' commas, fractions and exponents are read."""
    found = NUMBER.findall(text)
    if not found:
        return None
    top, _, bottom = found[-1].replace(",", "").replace(" ", "").partition("/")
    if bottom and not int(bottom.split("e")[0].split("E")[0]):
        return None
    return Fraction(top) / Fraction(bottom or "1")
