"""From token log-probabilities to one loss per list: score functions, objectives with their weights, modifiers."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from align.losses.metrics import list_metrics
from align.objectives import (
    ObjectiveConfig,
    ScoreConfig,
    dpop_penalty,
    token_regularizer,
    wpo_list_weights,
    wpo_weights,
)
from align.objectives.base import GIVEN
from align.objectives.noise import resolution, sum_noise
from align.objectives.pointwise import Sft
from align.objectives.policy_gradient import completion_keys
from align.objectives.scores import LikelihoodMean
from align.objectives.token_reg import Column, Tgdpo, TokenReg, TokenWeights, list_places, tgdpo_weights, token_reg
from align.types import ListBatch, TokenStats


@dataclass(frozen=True)
class Term:
    """One objective on one score function, and its factor in the sum."""

    weight: float
    score: Callable[..., Float[Tensor, " N"]]
    objective: Callable[..., Float[Tensor, " B"]]
    beta: float
    takes: frozenset[str]
    """What else the objective is given, of `GIVEN`."""
    needs_reference: bool
    pair_weights: Callable[..., Float[Tensor, "B K K"]]
    """Of (scores, grades, list_mask, noise); T-REG's too."""
    margin: float
    """SimPO's gamma; 0 where there is none."""
    length_power: float
    """The score's sum over tokens is divided by this power of their number."""


class ListLoss:
    """The loss of every list of a batch, by a recipe's terms and modifiers."""

    def __init__(
        self,
        terms: Sequence[Term],
        *,
        wpo: str | None = None,
        dpop: float | None = None,
        z_penalty: float | None = None,
        regularizer: TokenReg | None = None,
        token_weights: TokenWeights | None = None,
        relative: float | None = None,
    ) -> None:
        """Args:
        terms: their weighted sum is the loss; the first one's scores are the policy's implicit rewards.
        wpo: "clamped" or "unclamped" weights of whole lists.
        dpop: lambda of the penalty on a best completion that falls.
        z_penalty: factor of a list's mean over tokens of (log Z)^2, Z what the head's softmax divides by.
        regularizer: goes with the first term.
        token_weights: how much each token counts in the scores that the objectives get. Where it is not Column, the
            lists' `token_weights` are what their messages weigh: these count in every score, and in the number of
            tokens that a mean divides by.
        relative: how far a token's log-probability may be off by rounding, from `resolution`; by default float32's.
        """
        self.terms = terms
        self.wpo = wpo
        self.dpop = dpop
        self.z_penalty = z_penalty
        self.regularizer = regularizer
        self.token_weights = token_weights
        self.relative = resolution(torch.float32) if relative is None else relative
        self.takes_margins = any("margins" in term.takes for term in terms)
        self.needs_baseline = any("baseline" in term.takes for term in terms)
        self.needs_reference = dpop is not None or any(term.needs_reference for term in terms)
        wanted = {"logprob": True, "log_sum_sq_probs": wpo, "logsumexp": z_penalty}
        self.outputs: tuple[str, ...] = tuple(name for name, asked in wanted.items() if asked)

    def scores(self, stats: TokenStats, reference: Tensor | None, batch: ListBatch) -> Float[Tensor, "B K"]:
        """The policy's implicit rewards: the first term's scores, every token counting as much as its message."""
        return self._scores(self.terms[0], stats.logprobs, reference, batch, self.message_weights(batch))

    def message_weights(self, batch: ListBatch) -> Float[Tensor, "N C"] | None:
        """How much the message of every token counts; None where no message says so."""
        return None if isinstance(self.token_weights, Column) else batch.token_weights

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
        weights = self._weights(batch)
        for term in self.terms:
            tokens = (stats.logprobs, reference, batch, weights)
            scores, noise = self._scores(term, *tokens), self._noise(term, *tokens)
            if self.regularizer and term is self.terms[0]:
                logprobs = stats.logprobs if weights is None else stats.logprobs * weights
                losses = losses + term.weight * self._token_reg(self.regularizer, scores, noise, logprobs, batch)
            if self.dpop is not None and term.needs_reference:
                lists = (scores, batch.grades, batch.list_mask)
                penalty = dpop_penalty(*lists, strength=self.dpop, noise=noise)
                scores, noise = scores - penalty, noise.where(penalty == 0, (1 + self.dpop) * noise)
            given: dict[str, Any] = {"baseline": 0.0 if baseline is None else baseline * term.beta, "noise": noise}
            given["margins"] = batch.margins
            given["keys"] = None if batch.keys is None else completion_keys(batch.keys, scores.shape[1])
            extra = {name: given[name] for name in term.takes}
            losses = losses + term.weight * term.objective(scores, batch.grades, batch.list_mask, **extra)
        losses = losses if self.wpo is None else losses * self._wpo_weights(stats, batch)
        return losses if not self.z_penalty else losses + self.z_penalty * _mean_square(stats.logsumexp, batch)

    def metrics(
        self, batch: ListBatch, stats: TokenStats, reference: Tensor | None, scores: Float[Tensor, "B K"]
    ) -> dict[str, Float[Tensor, " _"]]:
        """What is measured of a batch; see `list_metrics`."""
        noise = self._noise(self.terms[0], stats.logprobs, reference, batch, self.message_weights(batch))
        return list_metrics(batch, stats, reference, scores, noise=noise, relative=self.relative)

    def begin_step(self, *_: Any) -> None:
        """Nothing depends on a whole step but KTO's baseline, which the trainer computes."""

    def _scores(
        self, term: Term, logprobs: Tensor, reference: Tensor | None, batch: ListBatch, weights: Tensor | None
    ) -> Float[Tensor, "B K"]:
        return batch.to_lists(self._score(term, logprobs, reference, batch, weights))

    def _noise(
        self, term: Term, logprobs: Tensor, reference: Tensor | None, batch: ListBatch, weights: Tensor | None
    ) -> Float[Tensor, "B K"]:
        """How far each of a term's scores may be off by rounding."""

        def score(own: Tensor) -> Tensor:
            return self._score(term, own, reference, batch, weights)

        return batch.to_lists(sum_noise(score, logprobs, batch.completion_mask, self.relative))

    def _score(
        self, term: Term, logprobs: Tensor, reference: Tensor | None, batch: ListBatch, weights: Tensor | None
    ) -> Float[Tensor, " N"]:
        """A term's scores of both log-probabilities times the token's weight: each is linear in their difference."""
        if weights is not None:
            logprobs, reference = logprobs * weights, None if reference is None else reference * weights
        scores = term.score(logprobs, reference, batch.completion_mask, batch.list_index)
        counted = self._counted(batch)
        return scores if counted is None else scores * counted**-term.length_power

    def _counted(self, batch: ListBatch) -> Float[Tensor, " N"] | None:
        """What messages weigh a token of each completion on average; None where they do not."""
        weights = self.message_weights(batch)
        return None if weights is None else weights.sum(dim=1) / batch.completion_mask.sum(dim=1)

    def _weights(self, batch: ListBatch) -> Float[Tensor, "N C"] | None:
        """How much every token counts in the scores; None where all count alike."""
        if not isinstance(self.token_weights, Tgdpo):
            return batch.token_weights if self.token_weights is None else _given(batch.token_weights)
        rewards = _given(batch.token_rewards)
        places = list_places(batch.grades, batch.list_mask)[batch.list_index, batch.slot].to(rewards.dtype)
        weights = tgdpo_weights(rewards, places, alpha=self.token_weights.alpha)
        return weights if batch.token_weights is None else weights * batch.token_weights

    def _token_reg(
        self, regularizer: TokenReg, scores: Tensor, noise: Tensor, logprobs: Tensor, batch: ListBatch
    ) -> Float[Tensor, " B"]:
        term, mask = self.terms[0], batch.completion_mask
        values = token_regularizer(logprobs, _given(batch.token_rewards), mask, term.beta)
        counted = self._counted(batch)
        lengths = mask.sum(dim=1).clamp(min=1) if counted is None else mask.sum(dim=1) * counted
        values = values / lengths**term.length_power
        lists = (scores, batch.grades, batch.list_mask)
        options = regularizer.model_dump(exclude={"name"})
        pairs = term.pair_weights(*lists, noise=noise)
        margins = batch.margins if "margins" in term.takes else None
        return token_reg(batch.to_lists(values), *lists, pairs, margin=term.margin, margins=margins, **options)

    def _wpo_weights(self, stats: TokenStats, batch: ListBatch) -> Float[Tensor, " B"]:
        assert stats.log_sum_sq_probs is not None, "`outputs` asks for it"
        logprobs, squares, counted = stats.logprobs, stats.log_sum_sq_probs, self._counted(batch)
        if counted is not None:
            share = _given(self.message_weights(batch)) / counted[:, None]
            logprobs, squares = logprobs * share, squares * share
        weights = wpo_weights(logprobs, squares, batch.completion_mask)
        return wpo_list_weights(batch.to_lists(weights), batch.list_mask, clamp=self.wpo == "clamped")


def build_loss(
    score: ScoreConfig,
    objectives: Sequence[ObjectiveConfig],
    *,
    wpo: str | None = None,
    dpop: float | None = None,
    z_penalty: float | None = None,
    regularizer: TokenReg | None = None,
    token_weights: TokenWeights | None = None,
    relative: float | None = None,
) -> ListLoss:
    """The loss that a recipe's keys of these names describe; `relative` as for ListLoss."""
    return ListLoss(
        [_term(objective, objective.score or score) for objective in objectives],
        wpo=wpo,
        dpop=dpop,
        z_penalty=z_penalty,
        regularizer=regularizer,
        token_weights=token_weights,
        relative=relative,
    )


def likelihood_loss(relative: float | None = None, z_penalty: float | None = None) -> ListLoss:
    """Plain next-token loss on each list's best completion: every list counts its mean over tokens."""
    return ListLoss([_term(Sft(), LikelihoodMean(beta=1.0))], relative=relative, z_penalty=z_penalty)


def _term(objective: ObjectiveConfig, score: ScoreConfig) -> Term:
    function, options = objective.load(), objective.options()
    takes = inspect.signature(function).parameters
    if "beta" in takes:
        options.setdefault("beta", score.beta)
    return Term(
        weight=objective.weight,
        score=partial(score.load(), **score.options()),
        objective=partial(function, **options),
        beta=score.beta,
        takes=frozenset(takes.keys() & set(GIVEN) - options.keys()),
        needs_reference=score.needs_reference,
        pair_weights=partial(objective.pair_weights, **options),
        margin=options["margin"] if objective.name == "logistic" else 0.0,
        length_power=getattr(score, "length_power", 1.0 if score.name == "log_ratio_mean" else 0.0),
    )


def _mean_square(log_z: Float[Tensor, "N C"] | None, batch: ListBatch) -> Float[Tensor, " B"]:
    """Mean over a list's learnt tokens of log Z squared."""
    mask = batch.completion_mask
    sums = batch.to_lists(_given(log_z).where(mask, 0).square().sum(dim=1)).sum(dim=1)
    return sums / batch.to_lists(mask.sum(dim=1).to(sums.dtype)).sum(dim=1)


def _given(values: Tensor | None) -> Tensor:
    assert values is not None, "a recipe that needs it has it"
    return values
