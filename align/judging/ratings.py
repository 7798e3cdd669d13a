"""Models in order: strengths that explain who wins against whom. Shapes: M models, G prompts, B draws."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.judging.intervals import resampled

DRAWS = 1000
ROUNDS = 2000
"""Of the fit, at most."""
CLOSE = 1e-10
"""A round that changes no log-strength by more is the last."""
SPREAD = 400 / math.log(10)
"""Elo points of a log-strength: ten to one are 400."""
CENTRE = 1000.0


def log_strengths(wins: np.ndarray) -> np.ndarray:
    """Bradley-Terry: the s with P(a beats b) = sigmoid(s_a - s_b) under which the wins are likeliest, with mean 0.

    Every two models have half a win each on top, so that a model that always wins has a strength.

    Args:
        wins: [..., M, M] of the row's model over the column's; a tie is half a win of each. The diagonal is not read.

    Returns:
        [..., M]

    Source: Bradley and Terry, 1952; the fit is Hunter's MM algorithm, Annals of Statistics 32, 2004
    """
    own = (wins + 0.5) * (1 - np.eye(wins.shape[-1]))
    games, won = own + own.swapaxes(-1, -2), own.sum(-1)
    strength = np.ones_like(won)
    for _ in range(ROUNDS):
        before = strength
        strength = won / (games / (strength[..., :, None] + strength[..., None, :])).sum(-1)
        strength = strength / np.exp(np.log(strength).mean(-1, keepdims=True))
        if np.abs(np.log(strength / before)).max() < CLOSE:
            break
    return np.log(strength)


def ranking(models: Sequence[str], wins: np.ndarray, *, seed: int, draws: int = DRAWS) -> list[dict[str, Any]]:
    """Elo ratings about 1000 with 95 % intervals by the bootstrap over prompts, the best first.

    Args:
        models: [M] names.
        wins: [G, M, M] of each prompt, the mean over its comparisons of two models.
        seed: of the draws.
    """
    best = CENTRE + SPREAD * log_strengths(wins.sum(0))
    drawn = CENTRE + SPREAD * log_strengths(np.tensordot(resampled(len(wins), seed, draws), wins, axes=1))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    rows = zip(models, best.tolist(), low.tolist(), high.tolist(), strict=True)
    found = [{"model": name, "elo": elo, "low": a, "high": b} for name, elo, a, b in rows]
    return sorted(found, key=lambda row: -row["elo"])
