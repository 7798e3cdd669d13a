"""What the best of n completions would be worth."""

from collections.abc import Sequence
from math import comb


def best_of_n(rewards: Sequence[float]) -> list[float]:
    """E[max of n of them, drawn without replacement] for n = 1 ... K: unbiased for the best of n fresh completions.

    sum_i C(i - 1, n - 1) / C(K, n) r_(i), with r_(1) <= ... <= r_(K)

    Args:
        rewards: [K] of one prompt's completions.

    Source: Nakano et al., arXiv:2112.09332 (WebGPT), section 4 of its appendix
    """
    ordered, size = sorted(rewards), len(rewards)
    return [
        sum(comb(place, n - 1) * reward for place, reward in enumerate(ordered)) / comb(size, n)
        for n in range(1, size + 1)
    ]
