"""What a few seeds say of a mean: Student's t interval, and that of differences seed by seed."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean, stdev
from typing import Any

LEVEL = 0.95
"""Probability of an interval."""


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of independent values, and Student's t interval of 95 % around it.

    Returns:
        mean, low, high, sd (of one value) and n; low, high and sd are None of a single value.

    Raises:
        ValueError: there is no value.
    """
    mean, n = fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "sd": None, "n": n}
    sd = stdev(values)
    half = t_quantile(n - 1) * sd / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": sd, "n": n}


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[str, Any] | None:
    """The same of the differences between runs of one seed; None where no seed has both.

    Args:
        values: seed -> figure.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    return interval(differences) if differences else None


@cache
def t_quantile(freedom: int) -> float:
    """How many standard errors Student's t stays within, on both sides, with a probability of 95 %.

    Args:
        freedom: degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1e3
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """The probability that Student's t is between -t and t.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
