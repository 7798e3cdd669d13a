"""Reward models: `load_scorer(spec).score(prompts, completions)`; usable without the trainer."""

from rewards.combine import Reward, read_reward
from rewards.registry import SCORERS, ScorerConfig, load_scorer
from rewards.types import ReferenceScorer, RowError, Scorer, ScorerError

__all__ = [
    "SCORERS",
    "ReferenceScorer",
    "Reward",
    "RowError",
    "Scorer",
    "ScorerConfig",
    "ScorerError",
    "load_scorer",
    "read_reward",
]
