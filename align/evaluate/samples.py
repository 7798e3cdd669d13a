"""What the policy writes for held-out prompts, and its mean reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rewards import Scorer


@dataclass(frozen=True)
class Samples:
    """One sampled completion per prompt, with its reward where there is a scorer."""

    completions: list[str]
    rewards: list[float] | None

    def mean_reward(self) -> dict[str, float]:
        """`sample_reward` for a table of metrics; empty without a scorer or prompts."""
        return {"sample_reward": fmean(self.rewards)} if self.rewards else {}


def side_by_side(prompts: Sequence[str], before: Samples, after: Samples, *, show: int) -> list[dict[str, Any]]:
    """The first `show` prompts with the completion before and after training."""
    rows = []
    for i, prompt in list(enumerate(prompts))[:show]:
        row: dict[str, Any] = {"prompt": prompt}
        for when, samples in (("before", before), ("after", after)):
            row[when] = samples.completions[i]
            if samples.rewards:
                row[f"reward_{when}"] = samples.rewards[i]
        rows.append(row)
    return rows


def score_samples(prompts: Sequence[Any], completions: Sequence[str], scorer: Scorer | None) -> Samples:
    """Samples with their rewards."""
    rewards = list(scorer.score(prompts, completions)) if scorer else None
    return Samples(list(completions), rewards)
