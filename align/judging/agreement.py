"""How far judges agree with each other."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any


def kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa of two judges' verdicts on the same things: (p_o - p_e) / (1 - p_e).

    p_o is how often they are the same, p_e how often they would be if each drew from its own verdicts at random.

    Returns:
        1 for the same verdicts, 0 for no more than chance; None where each gives one and the same verdict throughout.

    Source: Cohen, 1960
    """
    count = len(first)
    same = sum(a == b for a, b in zip(first, second, strict=True)) / count
    own, other = Counter(first), Counter(second)
    chance = sum(own[verdict] * other[verdict] for verdict in own) / count**2
    return None if chance == 1 else (same - chance) / (1 - chance)


def agreements(verdicts: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Of every two judges: how they agree on wins (1), ties (0) and losses (-1)."""
    return [
        {
            "judges": [one, other],
            "kappa": kappa(verdicts[one], verdicts[other]),
            "same": sum(a == b for a, b in zip(verdicts[one], verdicts[other], strict=True)) / len(verdicts[one]),
        }
        for one, other in combinations(verdicts, 2)
    ]
