"""Rewards of one list become grades: larger is better, and ties stay ties."""

import math
from collections.abc import Sequence
from typing import Literal

GradeMethod = Literal["win_probability", "rank", "quantile", "raw"]


def grades_from_rewards(rewards: Sequence[float], method: GradeMethod) -> list[float]:
    """Grades of a list's completions from their rewards.

    win_probability: mean over all j of sigmoid(r_i - r_j), with 1/2 on the diagonal; in (0, 1); where a gap between
        rewards is less than float64 can add to 1/2, the next number
    rank: how many of the others it beats, a tie counting one half; K - 1 for the best, 0 for the worst
    quantile: rank / (K - 1); in [0, 1]
    raw: the reward itself

    Args:
        rewards: finite, larger is better, in a scorer's own unit; one per completion.
        method: one of the four.

    Returns:
        One grade per completion; a list of one gets 1/2, 0, 1/2 or its reward; an empty list stays empty.

    Source: win_probability: LiPO, arXiv:2402.01878; the others: ours.
    """
    if method == "raw":
        return [float(reward) for reward in rewards]
    if method == "win_probability":
        return _in_order(rewards, [sum(_sigmoid(r - other) for other in rewards) / len(rewards) for r in rewards])
    beaten = [sum(0.5 + 0.5 * _sign(r - other) for other in rewards) - 0.5 for r in rewards]
    if method == "rank":
        return beaten
    return [0.5 if len(rewards) == 1 else count / (len(rewards) - 1) for count in beaten]


def _in_order(rewards: Sequence[float], grades: list[float]) -> list[float]:
    """The grades, raised by a rounding where they do not rise with the rewards."""
    raised: dict[float, float] = {}
    last = -math.inf
    for reward, grade in sorted(zip(rewards, grades, strict=True)):
        if reward not in raised:
            raised[reward] = last = max(grade, math.nextafter(last, math.inf))
    return [raised[reward] for reward in rewards]


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)
