"""From token log-probabilities to one loss per list: score functions, objectives with their weights, modifiers."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from align.objectives import OBJECTIVES, PROPERTIES, ObjectiveConfig, ScoreConfig
from align.objectives.modifiers import dpop_penalty, wpo_weights
from align.objectives.scores import REFERENCE_FREE, SCORES, LikelihoodMean
from align.types import ListBatch, TokenStats

Score = Callable[..., Float[Tensor, " N"]]
Objective = Callable[..., Float[Tensor, " B"]]


@dataclass(frozen=True)
class Term:
    """One objective on one score function, and its factor in the sum."""

    name: str
    weight: float
    score: Score
    objective: Objective


class ListLoss:
    """The loss of every list of a batch, by the recipe's terms and modifiers."""

    def __init__(self, terms: Sequence[Term], *, score: Score, beta: float, needs_reference: bool) -> None:
        self.terms = terms
        self.score = score
        self.beta = beta
        self.needs_reference = needs_reference
