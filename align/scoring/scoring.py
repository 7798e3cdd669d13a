"""A window of rows -> the raw rewards of every scorer, or the reason why a row has none."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from align.runs.memory import scoring_in_words
from align.runs.scorers import load_scorer
from align.scoring.cache import reward_key
from align.scoring.items import Item
from rewards import RowError
from rewards.broken import why_not_finite
from rewards.config import ScorerConfig
from rewards.texts import text_key


@dataclass(frozen=True)
class Scored:
    """One row with what the scorers say about it."""

    item: Item
    rewards: list[list[float]]
    """By scorer, then by completion; [] where the item has a reason."""


@dataclass
class Part:
    """One scorer, what its rewards depend on, and what is known of it already."""

    config: ScorerConfig
    digest: str
    place: int
    """Its place among the scorers."""
    scorer: Any = None
    cached: int = 0
    """Rewards that the cache gave."""

    @property
    def listwise(self) -> bool:
        """Whether a reward depends on the other completions of its list."""
        return bool(getattr(self.config, "listwise", False))

    def keys(self, item: Item) -> list[bytes]:
        """The key of each completion's reward."""
        prompt, own = text_key(item.prompt), [text_key(completion) for completion in item.completions]
        more = list(own) if self.listwise else []
        if item.answers[self.place] is not None:
            more.append(str(item.answers[self.place]))
        return [reward_key(self.digest, [prompt, completion, *more]) for completion in own]

    def rewards(self, items: Sequence[Item], cached: Mapping[bytes, float]) -> dict[bytes, float]:
        """The reward of every key of the items; equal texts are scored once, and cached ones not at all.

        Raises:
            RowError: one of them cannot be scored.
        """
        todo: dict[bytes, tuple[Item, int]] = {}
        for item in items:
            for k, key in enumerate(self.keys(item)):
                todo.setdefault(key, (item, k))
        known = {key: cached[key] for key in todo if key in cached}
        self.cached += len(known)
        left = [(key, item, k) for key, (item, k) in todo.items() if key not in known]
        if not self.listwise:
            return known | dict(self._score(left))
        for item in {id(item): item for _, item, _ in left}.values():  # a list at a time, with equal texts in it
            known |= dict(self._score([(key, item, k) for k, key in enumerate(self.keys(item))]))
        return known

    def _score(self, entries: Sequence[tuple[bytes, Item, int]]) -> list[tuple[bytes, float]]:
        if not entries:
            return []
        if self.scorer is None:
            self.scorer = load_scorer(self.config)
        prompts = [item.prompt for _, item, _ in entries]
        completions = [item.completions[k] for _, item, k in entries]
        column = getattr(self.config, "answer_column", None)
        answers = [] if column is None else [[item.answers[self.place] for _, item, _ in entries]]
        with scoring_in_words(self.config, "--tokens-per-batch {}", goes_on="what is scored already is kept"):
            found = self.scorer.score(prompts, completions, *answers)
        for value in found:
            if not math.isfinite(value):
                model = getattr(self.scorer, "model", None)
                why = why_not_finite(model, value) if isinstance(model, nn.Module) else ""
                raise RowError(f"scorer {self.config.name} gives {value}; {why or 'no reward can be compared with it'}")
        return [(key, value) for (key, _, _), value in zip(entries, found, strict=True)]


def score_window(window: Sequence[Item], parts: Sequence[Part], cached: Mapping[bytes, float]) -> list[Scored]:
    """Every row of a window, in order, with its rewards; a row that cannot be scored gets a reason.

    Args:
        cached: rewards that are known already, by their keys.

    Raises:
        ScorerError: a scorer does not work at all.
    """
    items = [item for item in window if item.reason is None]
    try:
        found = [(part, part.rewards(items, cached)) for part in parts]
    except RowError as error:
        if len(window) > 1:  # which of them it is, each by itself tells
            return [scored for item in window for scored in score_window([item], parts, cached)]
        (item,) = window
        return [Scored(replace(item, reason=f"{item.source}, row {item.number}: {error}"), [])]
    return [
        Scored(item, [[own[key] for key in part.keys(item)] for part, own in found] if item.reason is None else [])
        for item in window
    ]
