"""From token log-probabilities to one loss per list: score functions, objectives with their weights, modifiers."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from align.metrics import list_metrics
from align.objectives import (
    OBJECTIVES,
    REFERENCE_FREE,
    SCORES,
    ObjectiveConfig,
    ScoreConfig,
    dpop_penalty,
    wpo_list_weights,
    wpo_weights,
)
from align.objectives.pointwise import Sft
from align.objectives.scores import LikelihoodMean
from align.types import ListBatch, TokenStats


@dataclass(frozen=True)
class Term:
    """One objective on one score function, and its factor in the sum."""

    weight: float
    score: Callable[..., Float[Tensor, " N"]]
    objective: Callable[..., Float[Tensor, " B"]]
    beta: float
    takes_baseline: bool
    needs_reference: bool


class ListLoss:
    """The loss of every list of a batch, by a recipe's terms and modifiers."""

    def __init__(self, terms: Sequence[Term], *, wpo: str | None = None, dpop: float | None = None) -> None:
        """Args:
        terms: their weighted sum is the loss; the first one's scores are the policy's implicit rewards.
        wpo: "clamped" or "unclamped" weights of whole lists.
        dpop: lambda of the penalty on a best completion that falls.
        """
        self.terms = terms
        self.wpo = wpo
        self.dpop = dpop
        self.needs_baseline = any(term.takes_baseline for term in terms)
        self.needs_reference = dpop is not None or any(term.needs_reference for term in terms)
        self.outputs: tuple[str, ...] = ("logprob", "log_sum_sq_probs") if wpo else ("logprob",)

    def scores(self, stats: TokenStats, reference: Tensor | None, batch: ListBatch) -> Float[Tensor, "B K"]:
        """The policy's implicit rewards: the first term's scores."""
        return self._scores(self.terms[0], stats, reference, batch)

    def __call__(
        self, stats: TokenStats, reference: Tensor | None, batch: ListBatch, baseline: Tensor | None = None
    ) -> Float[Tensor, " B"]:
        """One loss per list.

        Args:
            stats: the policy's token statistics, with `outputs`.
            reference: the reference's token log-probabilities [N, C]; None where nothing needs them.
            baseline: KTO's divergence estimate in nats, where `needs_baseline`.
        """
        losses: Any = 0.0
        for term in self.terms:
            scores = self._scores(term, stats, reference, batch)
            if self.dpop is not None and term.needs_reference:
                scores = scores - dpop_penalty(scores, batch.grades, batch.list_mask, strength=self.dpop)
            extra = {"baseline": 0.0 if baseline is None else baseline * term.beta} if term.takes_baseline else {}
            losses = losses + term.weight * term.objective(scores, batch.grades, batch.list_mask, **extra)
        return losses if self.wpo is None else losses * self._wpo_weights(stats, batch)

    def metrics(
        self, batch: ListBatch, stats: TokenStats, reference: Tensor | None, scores: Float[Tensor, "B K"]
    ) -> dict[str, Float[Tensor, " _"]]:
        """What is measured of a batch; see `list_metrics`."""
        return list_metrics(batch, stats, reference, scores)

    def begin_step(self, *_: Any) -> None:
        """Nothing depends on a whole step but KTO's baseline, which the trainer computes."""

    def _scores(self, term: Term, stats: TokenStats, reference: Tensor | None, batch: ListBatch) -> Tensor:
        return batch.to_lists(term.score(stats.logprobs, reference, batch.completion_mask, batch.list_index))

    def _wpo_weights(self, stats: TokenStats, batch: ListBatch) -> Float[Tensor, " B"]:
        assert stats.log_sum_sq_probs is not None, "`outputs` asks for it"
        weights = wpo_weights(stats.logprobs, stats.log_sum_sq_probs, batch.completion_mask)
        return wpo_list_weights(batch.to_lists(weights), batch.list_mask, clamp=self.wpo == "clamped")


def build_loss(
    score: ScoreConfig, objectives: Sequence[ObjectiveConfig], *, wpo: str | None = None, dpop: float | None = None
) -> ListLoss:
    """The loss that a recipe's `score`, `objective`, `wpo` and `dpop` describe."""
    return ListLoss([_term(objective, objective.score or score) for objective in objectives], wpo=wpo, dpop=dpop)


def likelihood_loss() -> ListLoss:
    """Plain next-token loss on each list's best completion: every list counts its mean over tokens."""
    return ListLoss([_term(Sft(), LikelihoodMean(beta=1.0))])


def _term(objective: ObjectiveConfig, score: ScoreConfig) -> Term:
    function = OBJECTIVES[objective.name]
    takes = inspect.signature(function).parameters
    options = objective.model_dump(exclude={"name", "weight", "score"})
    if "beta" in takes:
        options["beta"] = score.beta
    return Term(
        weight=objective.weight,
        score=partial(SCORES[score.name], **score.model_dump(exclude={"name"})),
        objective=partial(function, **options),
        beta=score.beta,
        takes_baseline="baseline" in takes,
        needs_reference=score.name not in REFERENCE_FREE,
    )
