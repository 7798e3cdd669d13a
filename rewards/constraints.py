"""The share of a row's own rules that a completion keeps (UltraGen's constraint satisfaction rate)."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rewards.registry import load_scorer
from rewards.types import RowError, Scorer, ScorerError, Tally, Text

RULES = ("length", "format", "regex")
"""Scorers that a row may bring: neither code nor a model, whatever a stranger's row says."""


class ConstraintsScorer:
    """Rewards by each row's rules; see `Constraints` for the arguments."""

    def __init__(self, *, answer_column: str) -> None:
        self.column = answer_column
        self.tally = Tally()

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], answers: Sequence[Any]) -> list[float]:
        """Kept rules / rules; see ReferenceScorer.score.

        Args:
            answers: the rules of each completion's row, as JSON.

        Raises:
            RowError: no list of rules, or one that is none, or a pattern that a completion keeps busy.

        Source: hard constraints of UltraGen, arXiv:2502.12375
        """
        self.tally.completions += len(prompts)
        shares = []
        for prompt, own, text in zip(prompts, completions, answers, strict=True):
            try:
                rules = rules_of(str(text))
                shares.append(sum(rule.score([prompt], [own])[0] for rule in rules) / len(rules))
            except ScorerError as error:
                raise RowError(f"{self.column}: {error}") from None
        return shares


@lru_cache  # the completions of a row have the same
def rules_of(text: str) -> list[Scorer]:
    """The rules that a JSON text lists.

    Raises:
        ScorerError: it is no such list, or a rule is wrong.
    """
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScorerError(f"no JSON ({error}); give the JSON text of a list of rules") from None
    if not isinstance(listed, list) or not listed:
        raise ScorerError('holds no rule; give the JSON text of a list such as [{"name": "length", "max": 80}]')
    return [_rule(rule, f"rule {number}") for number, rule in enumerate(listed, start=1)]


def _rule(rule: Any, place: str) -> Scorer:
    if not isinstance(rule, dict):
        raise ScorerError(f'{place} is no object; write it as {{"name": "length", "max": 80}}')
    if rule.get("name") not in RULES:
        raise ScorerError(
            f"{place} is {json.dumps(rule.get('name'))}; a row may bring {', '.join(RULES)}, and no code or model"
        )
    try:
        return load_scorer(rule)  # type: ignore[no-any-return]
    except ScorerError as error:
        raise ScorerError(f"{place}: {error}") from None
