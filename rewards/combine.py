"""Several scorers' rewards of the same completions as one."""

import math
from collections.abc import Sequence
from typing import Literal

Combination = Literal["weighted_sum", "and"]


def combine(rewards: Sequence[Sequence[float]], weights: Sequence[float], method: Combination) -> list[float]:
    """One reward per completion.

    weighted_sum: sum_k w_k r_k
    and:          sum_k w_k log sigma(r_k), with weights 1 the log-probability that a completion is good on every count;
                  a reward that is a log-probability itself (never above 0, as `lsc` gives it) enters as it is

    Args:
        rewards: of each scorer, after its transforms, one per completion.
        weights: of each scorer.
        method: one of the two.

    Source: and: LSC, arXiv:2402.00742
    """
    return [sum(w * r for w, r in zip(weights, column, strict=True)) for column in zip(*rewards, strict=True)]
