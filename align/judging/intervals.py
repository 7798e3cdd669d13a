"""Means over prompts with their bootstrap intervals. Shapes: G prompts, B draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
DRAWS = 10_000
AT_ONCE = 2**22
"""Numbers of one block of draws."""


@dataclass(frozen=True)
class Interval:
    """A mean and where it would lie in 95 of 100 samples of prompts."""

    mean: float
    low: float | None
    """None for one prompt, which says nothing about others."""
    high: float | None
    standard_error: float | None


def interval(
    values: Sequence[float], *, seed: int, bounds: tuple[float, float] | None = None, draws: int = DRAWS
) -> Interval:
    """The mean over prompts, and its expanded percentile interval by the bootstrap over prompts.

    A prompt's value is the mean over its comparisons, so that these are resampled together: the interval is clustered
    by prompt, and paired where a value is a difference or a win of two answers to one prompt.
    Percentiles at Phi(-+ sqrt(G / (G - 1)) t_{G-1}) in place of 2.5 and 97.5 %, without which the interval of few
    prompts is too narrow. Where all prompts have one value v and values have bounds (a, b), a share q of other prompts
    may have gone unseen, (1 - q)^G = 2.5 %: the interval is from (1 - q) v + q a to (1 - q) v + q b.

    Args:
        values: [G], one for each prompt; G >= 1.
        seed: of the draws.
        bounds: that no value is beyond, such as (0, 1).
        draws: B.

    Source: Hesterberg, arXiv:1411.5279 (expanded percentiles); the bound of all alike: Clopper and Pearson's
    """
    own = np.asarray(values, dtype=np.float64)
    mean, count = float(own.mean()), len(own)
    if count == 1:
        return Interval(mean, None, None, None)
    error = float(own.std(ddof=1)) / math.sqrt(count)
    if np.ptp(own) == 0:
        low, high = bounds or (mean, mean)
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / count)
        return Interval(mean, mean + unseen * (low - mean), mean + unseen * (high - mean), error)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * t_quantile((1 + LEVEL) / 2, count - 1))
    low, high = np.quantile(_means(own, seed, draws), [tail, 1 - tail])
    return Interval(mean, float(low), float(high), error)


def of_standard_error(
    mean: float, error: float | None, clusters: int, *, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """mean -+ t_{G-1} standard errors, cut at the bounds; None for one cluster."""
    if error is None or clusters < 2:
        return Interval(mean, None, None, None)
    reach = t_quantile((1 + LEVEL) / 2, clusters - 1) * error
    return Interval(mean, max(mean - reach, bounds[0]), min(mean + reach, bounds[1]), error)


def resampled(count: int, seed: int, draws: int) -> np.ndarray:
    """[B, G] how often each prompt is drawn."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)


def t_quantile(share: float, freedom: int) -> float:
    """Student's t below which a share lies; to 1 % from 3 degrees of freedom on, exact for 1 and 2.

    Source: Abramowitz and Stegun 26.7.5
    """
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _means(values: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """[B] means of as many prompts drawn with replacement."""
    generator = np.random.default_rng(seed)
    size = max(1, AT_ONCE // len(values))
    parts = [
        values[generator.integers(len(values), size=(min(size, draws - done), len(values)))].mean(axis=1)
        for done in range(0, draws, size)
    ]
    return np.concatenate(parts)
