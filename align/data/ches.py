"""CHES: which lists are likely to lower the probability of their best completion, and what becomes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Array = np.ndarray


def ches_scores(
    gram: Float[Array, "K K"], lengths: Sequence[int], grades: Sequence[float]
) -> tuple[Float[Array, " O"], Float[Array, " O"]]:
    """CHES of the best completion against every worse one: large where it is likely to lose probability.

    <S+, S-> - ||S+||^2, and by lengths <S+, S-> / (T+ T-) - ||S+||^2 / T+^2; S the sum over a completion's tokens of
    the final hidden states that predict them, T their number

    Args:
        gram: inner products of the completions' mean hidden states S / T.
        lengths: T, of the tokens that are learnt.
        grades: larger is better; of several best ones the first counts.

    Returns:
        Both forms, one number per completion with a lower grade than the best; none for a list of ties.

    Source: arXiv:2410.08847, definition 2 and its length-normalised form; lists of more than two: ours.
    """
    best = int(np.argmax(grades))
    others = [k for k, grade in enumerate(grades) if grade < grades[best]]
    sizes = np.asarray(lengths, dtype=np.float64)
    sums = gram * sizes[:, None] * sizes[None, :]
    return sums[best, others] - sums[best, best], gram[best, others] - gram[best, best]


@dataclass(frozen=True)
class Choice:
    """What a CHES filter makes of lists."""

    kept: Float[Array, " B"]
    """True for the lists within the bound."""
    bound: float
    """The largest score that is kept."""


def choose_lists(scores: Sequence[float], *, keep_fraction: float | None, threshold: float | None) -> Choice:
    """The lists of the lowest scores.

    Args:
        scores: of every list.
        keep_fraction: share of the lists to keep, at least one; equal scores are kept in the lists' order.
        threshold: or the largest score to keep.

    Returns:
        Which are kept, and where the bound lies.

    Source: arXiv:2410.08847, section 6 (which keeps 0.05); ours for thresholds.
    """
    values = np.asarray(scores, dtype=np.float64)
    if threshold is not None:
        return Choice(values <= threshold, threshold)
    assert keep_fraction is not None, "the recipe gives one of the two"
    order = np.argsort(values, kind="stable")[: max(1, round(keep_fraction * len(values)))]
    kept = np.zeros(len(values), dtype=bool)
    kept[order] = True
    return Choice(kept, float(values[order[-1]]))
