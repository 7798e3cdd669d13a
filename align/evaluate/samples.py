"""What the policy writes for held-out prompts, and its mean reward."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from align.evaluate.token_view import TokenValues
from align.run_directory import read_json, write_json


@dataclass(frozen=True)
class Measured:
    """The policy at one moment: metrics on held-out lists, one sampled completion per prompt with its reward, a few
    lists token by token, and how far every held-out list's best completion has moved in log-probability."""

    metrics: dict[str, float]
    completions: list[str]
    rewards: list[float]
    token_logprobs: TokenValues = field(default_factory=list)
    changes: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> "Measured":
        return Measured(**read_json(path))

    def all_metrics(self) -> dict[str, float]:
        """The metrics, with the mean reward of the samples where they have one."""
        return self.metrics | ({"sample_reward": fmean(self.rewards)} if self.rewards else {})


def side_by_side(prompts: Sequence[str], before: Measured, after: Measured) -> list[dict[str, Any]]:
    """Prompts with their completion before and after training, and both rewards."""
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt, "before": before.completions[i], "after": after.completions[i]}
        if before.rewards:
            row |= {"reward_before": before.rewards[i], "reward_after": after.rewards[i]}
        rows.append(row)
    return rows
