"""Token-level members: T-REG's regularizer, and weights of single tokens (TGDPO, or a column of the data)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from align.objectives.lists import differences, masked_sum, ordered_pairs, per_pair
from align.section import Strict
from align.tensors import Bool, Float, Tensor, torch


def token_regularizer(
    token_logprobs: Float[Tensor, "N C"],
    token_rewards: Float[Tensor, "N C"],
    completion_mask: Bool[Tensor, "N C"],
    beta: float,
) -> Float[Tensor, " N"]:
    """T-REG's term of one completion: tokens with a positive reward are to become likelier, others less likely.

    L_reg = -beta * sum_t rhat_t lp_t

    Args:
        token_logprobs: lp, log p(token) under the policy, in nats.
        token_rewards: rhat in (-0.5, 0.5), without gradient.
        completion_mask: True on a completion's own tokens; elsewhere anything, even NaN.
        beta: strength of the pull to the reference, that of the score.

    Returns:
        One value per completion, in nats; 0 for an empty one.

    Source: T-REG, arXiv:2412.02685 (published notes).
    """
    rewards = token_rewards.detach().masked_fill(~completion_mask, 0)
    return -beta * masked_sum(rewards * token_logprobs, completion_mask)


def token_reg(
    regularizers: Float[Tensor, "B K"],
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    pair_weights: Float[Tensor, "B K K"],
    *,
    alpha: float = 0.25,
    detach_weight: bool = True,
    static_weight: float | None = None,
    margin: float = 0.0,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """T-REG's addition to the loss of a list: each ordered pair weighs the terms of its two completions.

    alpha * sum over g_i > g_j of Delta_ij w_ij (L_i + L_j),  w_ij = sigmoid(s_j - s_i + margin), constant

    With `logistic` and w constant, a token's gradient is -(w beta)(1 + alpha rhat_t) on the better and +(w beta)(1 -
    alpha rhat_t) on the worse side of a pair: no sign changes for alpha < 2.

    Args:
        regularizers: L, from `token_regularizer`.
        scores: s in nats, beta included.
        grades: larger is better; a tie forms no pair.
        list_mask: False marks padding, which may hold anything.
        pair_weights: Delta, those of the objective: see `align.objectives.pair_weights`.
        alpha: share of the regularizer; the paper takes 0.1 to 0.5.
        detach_weight: hold w constant in the backward pass.
        static_weight: takes the place of w (the paper's ablation).
        margin: gamma of SimPO.
        margins: the rows' own, one per list, added to it; None where they have none.

    Returns:
        One value per list, in nats; 0 with zero gradient for a list of ties.

    Source: T-REG, arXiv:2412.02685 (published notes); lists of more than two: ours.
    """
    pairs = ordered_pairs(grades, list_mask)
    gaps = (differences(scores) - per_pair(margins, scores)).masked_fill(~pairs, 0)
    live = torch.sigmoid(margin - gaps) if static_weight is None else torch.full_like(gaps, static_weight)
    weights = (live.detach() if detach_weight else live).masked_fill(~pairs, 0) * pair_weights
    return alpha * masked_sum(regularizers * (weights.sum(dim=2) + weights.sum(dim=1)), list_mask)


class TokenReg(Strict):
    """T-REG."""

    name: Literal["token_reg"] = "token_reg"
    alpha: Annotated[float, Field(ge=0)] = 0.25
    """Share of the regularizer; the paper takes 0.1 to 0.5, and below 2 no token's gradient changes its sign."""
    detach_weight: bool = True
    """Hold a pair's weight sigmoid(s_worse - s_better) constant in the backward pass."""
    static_weight: PositiveFloat | None = None
    """A constant in place of that weight (the paper's ablation)."""

    @model_validator(mode="after")
    def _weight_is_live(self) -> TokenReg:
        if self.static_weight is not None and not self.detach_weight:
            raise ValueError("detach_weight: a static_weight has no gradient; remove one of the two")
        return self


def tgdpo_weights(
    token_rewards: Float[Tensor, "N C"], places: Float[Tensor, " N"], *, alpha: float = 0.5
) -> Float[Tensor, "N C"]:
    """TGDPO: how much each token's log-ratio counts in the score of its completion.

    1 + alpha * place * rho_t; so 1 + alpha rho_t for the better and 1 - alpha rho_t for the worse of a pair

    Args:
        token_rewards: rho, without gradient.
        places: where a completion stands in its list, from `list_places`.
        alpha: strength; 0 is the base objective.

    Returns:
        One weight per token.

    Source: TGDPO, arXiv:2506.14574 (authors' code); lists of more than two: ours.
    """
    return 1 + alpha * places[:, None] * token_rewards.detach()


class Tgdpo(Strict):
    """TGDPO: a token's log-ratio counts more where its reward goes with the completion's place in the list."""

    name: Literal["tgdpo"] = "tgdpo"
    alpha: Annotated[float, Field(ge=0)] = 0.5
    """Strength."""


def list_places(grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """From 1 for a completion that is better than all others of its list, to -1 for one that is worse than all.

    (completions that are worse - completions that are better) / (their number); 0 where all others are tied with it

    Args:
        grades: larger is better.
        list_mask: False marks padding, which may hold anything.

    Returns:
        One place per completion, 0 for padding.

    Source: ours
    """
    pairs = ordered_pairs(grades, list_mask).to(grades.dtype)
    won, lost = pairs.sum(dim=2), pairs.sum(dim=1)
    return (won - lost) / (won + lost).clamp(min=1)


class Column(Strict):
    """The rows' own `token_weights`."""

    name: Literal["column"] = "column"


TokenWeights = Annotated[Tgdpo | Column, Field(discriminator="name")]
