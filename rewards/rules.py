"""Rewards by rule: no model, one completion at a time."""

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from rewards.texts import plain
from rewards.types import RowError, ScorerError, Tally, Text

NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d+)?(?:[eE][+-]?\d+)?")
ANSWER_MARKS = (r"\\boxed\{([^{}]*)\}", r"####\s*(.+)", r"(?i)answer(?: is|:)\s*(.+)")
"""Where a completion states its answer, the surest first."""


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


def length_scorer(*, unit: str, min: int, max: int | None) -> _Rule:
    """See `Length`; words are what white space separates."""

    def within(_: Text, completion: Text) -> float:
        text = plain(completion)
        size = len(text.split()) if unit == "words" else len(text)
        return float(min <= size <= (math.inf if max is None else max))

    return _Rule(within)


def format_scorer(*, json_object: bool, tags: Sequence[str]) -> _Rule:
    """See `Format`."""
    pattern = r"\s*".join(f"<{re.escape(tag)}>(?:(?!</?{re.escape(tag)}>).)*</{re.escape(tag)}>" for tag in tags)

    def formed(_: Text, completion: Text) -> float:
        text = plain(completion).strip()
        return float(_is_json_object(text) if json_object else bool(re.fullmatch(pattern, text, re.DOTALL)))

    return _Rule(formed)


def pattern_scorer(*, pattern: str, whole: bool) -> _Rule:
    """See `Pattern`."""
    compiled = re.compile(pattern)

    def matches(_: Text, completion: Text) -> float:
        text = plain(completion)
        return float(bool(compiled.fullmatch(text.strip()) if whole else compiled.search(text)))

    return _Rule(matches)


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

    def call(prompt: Text, completion: Text) -> float:
        try:
            value = found(prompt, completion)
            return float(value)
        except Exception as error:
            raise RowError(f"{function}: {type(error).__name__}: {error}") from error

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
