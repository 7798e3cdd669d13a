"""What the policy writes for held-out prompts, and its mean reward."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from align.evaluate.token_view import TokenValues
from align.files import read_object, write_json


@dataclass(frozen=True)
class Measured:
    """The policy at one moment: metrics on held-out lists, one sampled completion per prompt with its reward, a few
    lists token by token, and every held-out list's own figures by their names."""

    metrics: dict[str, float]
    completions: list[str]
    rewards: list[float]
    token_logprobs: TokenValues = field(default_factory=list)
    by_list: dict[str, list[float]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> "Measured":
        kept = read_object(path)
        return Measured(**{name: kept[name] for name in kept.keys() & Measured.__dataclass_fields__.keys()})

    def all_metrics(self) -> dict[str, float]:
        """The metrics, with the mean reward of the samples where they have one."""
        return self.metrics | ({"sample_reward": fmean(self.rewards)} if self.rewards else {})


def paired_changes(
    before: Measured, after: Measured, weights: Sequence[float] | None = None
) -> dict[str, dict[str, float]]:
    """By figure: its mean change over the lists (or samples) that define it both times, and how sure that is.

    d_i = after_i - before_i;  mean(d),  standard error std(d, ddof 1) / sqrt(n)
    with weights: m = sum w_i d_i / sum w_i,  sqrt(n / (n - 1) sum w_i^2 (d_i - m)^2) / sum w_i

    Args:
        weights: how often each held-out list counts.

    Returns:
        `difference`, `standard_error` and `lists` (n) of the figures with two lists at least.

    Source: the standard error of paired differences.
    """
    found = {}
    rewards = {"sample_reward": (before.rewards, after.rewards)}
    both = {name: (before.by_list.get(name, []), own) for name, own in after.by_list.items()} | rewards
    for name, (earlier, later) in both.items():
        places = [i for i, pair in enumerate(zip(earlier, later, strict=False)) if not any(map(math.isnan, pair))]
        gaps = [later[i] - earlier[i] for i in places]
        if len(gaps) > 1:
            own = None if weights is None or name == "sample_reward" else [weights[i] for i in places]
            difference, error = _mean_and_error(gaps, own)
            found[name] = {"difference": difference, "standard_error": error, "lists": len(gaps)}
    return found


def _mean_and_error(gaps: list[float], weights: list[float] | None) -> tuple[float, float]:
    n = len(gaps)
    if weights is None:
        return fmean(gaps), stdev(gaps) / math.sqrt(n)
    mean = fmean(gaps, weights)
    spread = math.fsum((w * (gap - mean)) ** 2 for w, gap in zip(weights, gaps, strict=True))
    return mean, math.sqrt(n / (n - 1) * spread) / math.fsum(weights)


def side_by_side(prompts: Sequence[str], before: Measured, after: Measured) -> list[dict[str, Any]]:
    """Prompts with their completion before and after training, and both rewards."""
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt, "before": before.completions[i], "after": after.completions[i]}
        if before.rewards:
            row |= {"reward_before": before.rewards[i], "reward_after": after.rewards[i]}
        rows.append(row)
    return rows
