"""What is judged: a prompt, the completions of every side, and which two of them are held against each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random
from typing import Any

from align.data.schema import Row, is_messages
from align.judging.sides import Written
from rewards.texts import plain

Pair = tuple[int, int]
ROWS = "rows"
"""The side that is the rows' own completions."""


@dataclass(frozen=True)
class Case:
    """One prompt."""

    row: Row
    """With all completions there are, each once."""
    sides: dict[str, list[int]]
    """A side's name -> the places of its completions among the row's."""
    pairs: dict[tuple[str, str], list[Pair]]
    """Two sides -> what is compared of them, in places among the row's."""
    labels: list[Pair]
    """Two of the rows' own completions, that with the better grade first."""

    @property
    def compared(self) -> list[Pair]:
        """Every pair that a judge of pairs is asked about; those of the same text are ties unasked."""
        every = [pair for own in self.pairs.values() for pair in own] + self.labels
        return list(dict.fromkeys((a, b) for a, b in every if a != b))

    def text(self, place: int) -> str:
        """A completion as text."""
        return plain(self.row.completions[place])  # type: ignore[arg-type]


def build_cases(sides: Sequence[Written], own: dict[str, Row], *, samples: int, seed: int) -> list[Case]:
    """The prompts that every side has answered.

    The k-th completion of a side is held against the k-th of each other one; the shorter of two lists begins again. Of
    a row's own completions as many pairs with different grades as there are samples are drawn, for the judge's
    agreement with the grades.

    Args:
        sides: the policy first.
        own: rows with completions of their own, by id; {} where there are none.
        samples: completions of a policy.
        seed: of the choice of pairs.
    """
    rows = next(side.rows for side in sides if side.rows)
    return [
        _case(rows[name], {side.name: side.completions[name] for side in sides}, own.get(name), samples, seed)
        for name in rows
        if all(side.completions.get(name) for side in sides)
    ]


def _case(row: Row, sides: dict[str, list[Any]], own: Row | None, samples: int, seed: int) -> Case:
    chat = is_messages(row.prompt)
    texts: list[Any] = []
    place: dict[str, int] = {}

    def placed(completion: Any) -> int:
        text = plain(completion)
        if text not in place:
            place[text] = len(texts)
            whole = [{"role": "assistant", "content": text}] if chat and isinstance(completion, str) else completion
            texts.append(whole)
        return place[text]

    places = {name: [placed(one) for one in completions] for name, completions in sides.items()}
    pairs = {(a, b): _matched(places[a], places[b]) for a, b in combinations(places, 2)}
    labels = [(placed(a), placed(b)) for a, b in _graded(own, samples, seed)] if own else []
    labels = [pair for pair in labels if pair[0] != pair[1]]
    return Case(replace(row, completions=tuple(texts)), places, pairs, labels)


def _matched(own: list[int], other: list[int]) -> list[Pair]:
    size = max(len(own), len(other))
    return [(own[k % len(own)], other[k % len(other)]) for k in range(size)]


def _graded(row: Row, samples: int, seed: int) -> list[tuple[Any, Any]]:
    grades = row.grades if row.grades is not None else row.rewards
    if grades is None:
        return []
    better = [(a, b) for a in range(len(grades)) for b in range(len(grades)) if grades[a] > grades[b]]
    drawn = Random(f"{seed} {row.id}").sample(better, min(samples, len(better)))
    return [(row.completions[a], row.completions[b]) for a, b in sorted(drawn)]
