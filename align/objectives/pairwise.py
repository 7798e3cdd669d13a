"""Objectives that sum a function of the margin d = s_i - s_j over the pairs of a list with g_i > g_j.

On a list of two this is the pair loss of the papers. Where rows have a `margin` m, d is s_i - s_j - m: the worse
completion counts as if it scored m more. Arguments: scores s in nats (beta included), grades g (larger is better; a tie
forms no pair), list_mask (False marks padding, whose score and grade may hold anything, even NaN), margins m (one per
list, in the unit of the scores; None where rows have none). Each returns one loss per list: 0 with zero gradient for a
list of ties.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from align.objectives.base import Properties
from align.objectives.lists import differences, ordered_pairs, over_ordered_pairs, per_pair
from align.objectives.noise import settled
from align.objectives.objective import OBJECTIVE, Objective
from align.objectives.scores import LikelihoodMean, ScoreConfig
from align.tensors import Bool, F, Float, Tensor, torch


def logistic(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    link: float = 0.0,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """DPO, cDPO and SimPO; on longer lists the Bradley-Terry loss over all ordered pairs.

    (1 - eps) l(d - margin) + eps l(margin - d),  l(d) = -log sigmoid(d)
    with a link q, l(d) = (1 - sigmoid(d)^q) / q: at 1 the probability of the wrong order, which no pair can
    exceed 1 in, so that few wrong preferences weigh less

    Args:
        scores, grades, list_mask, margins: see the module.
        label_smoothing: eps, the probability that a preference is flipped (cDPO).
        margin: how far apart scores should be (SimPO's gamma, on the score `likelihood_mean`).
        link: q, from 0 (the logarithm) to 1 (mean absolute error).

    Returns:
        One loss per list, in nats; 0 for a list of ties.

    Source: DPO, arXiv:2305.18290, eq. 7; SimPO, arXiv:2405.14734, eq. 6; all pairs: LiPO, arXiv:2402.01878; the link:
    generalised cross-entropy, arXiv:1805.07836, a comp-sum loss of arXiv:2304.07288.
    """

    def loss(d: Tensor) -> Tensor:
        return _smoothed(d - margin, label_smoothing, link)

    return over_ordered_pairs(loss, scores, grades, list_mask, margins)


@OBJECTIVE.add
class Logistic(Objective):
    """DPO, cDPO, SimPO; over all ordered pairs of a list."""

    formula = staticmethod(logistic)
    properties = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=True, of_rewards=True)
    trl = {
        "sigmoid": "{objective: {name: logistic}}",
        "sigmoid_norm": "{objective: {name: logistic}, score: {name: log_ratio_mean}}",
        "cpo_sigmoid": "{objective: [{name: logistic}, {name: sft}], score: {name: likelihood}}",
        "simpo": "{objective: {name: logistic, margin: 0.5}, score: {name: likelihood_mean, beta: 2.0}}",
    }

    name: Literal["logistic"] = "logistic"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference is flipped."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """How far apart scores should be (SimPO's gamma)."""
    link: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Above 0, wrong preferences weigh less (generalised cross-entropy); 1 is the probability of the wrong order."""


def robust(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    label_smoothing: float = 0.1,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """Robust DPO: an unbiased estimate of DPO's loss where a share of the preferences is flipped.

    [-(1 - eps) log sigmoid(d) + eps log sigmoid(-d)] / (1 - 2 eps)

    Args:
        scores, grades, list_mask, margins: see the module.
        label_smoothing: eps, the share of flipped preferences, below one half.

    Returns:
        One loss per list, in nats (it may be negative); 0 for a list of ties.

    Source: rDPO, arXiv:2403.00409, as in TRL 1.16.
    """

    def loss(d: Tensor) -> Tensor:
        clean, flipped = -F.logsigmoid(d), -F.logsigmoid(-d)
        return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)

    return over_ordered_pairs(loss, scores, grades, list_mask, margins)


@OBJECTIVE.add
class Robust(Objective):
    """Robust DPO for flipped preferences."""

    formula = staticmethod(robust)
    properties = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False)
    trl = {"robust": "{objective: {name: robust}}"}

    name: Literal["robust"] = "robust"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of flipped preferences."""


def hinge(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """SLiC: pairs are pushed apart until their margin is one.

    max(0, 1 - d)

    Args:
        scores, grades, list_mask, margins: see the module.

    Returns:
        One loss per list, in nats; 0 for a list of ties.

    Source: SLiC, arXiv:2305.10425; on log-ratios and all pairs: LiPO, arXiv:2402.01878 (SLiC_norm).
    """
    return over_ordered_pairs(lambda d: F.relu(1 - d), scores, grades, list_mask, margins)


@OBJECTIVE.add
class Hinge(Objective):
    """SLiC's hinge."""

    formula = staticmethod(hinge)
    properties = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False, of_rewards=True)
    trl = {
        "hinge": "{objective: {name: hinge}}",
        "cpo_hinge": "{objective: [{name: hinge}, {name: sft}], score: {name: likelihood}}",
    }

    name: Literal["hinge"] = "hinge"


def squared(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    beta: float,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """IPO: the margin of the unscaled log-ratios is regressed to 1 / (2 beta).

    (d / beta - 1 / (2 beta))^2

    Args:
        scores, grades, list_mask, margins: see the module.
        beta: the factor that is in the scores; it is divided out.

    Returns:
        One loss per list, in squared nats; 0 for a list of ties.

    Source: IPO, arXiv:2310.12036, eq. 17. Its authors average over tokens: score `log_ratio_mean`; the original DPO
    code sums: `log_ratio`.
    """
    return over_ordered_pairs(lambda d: ((d - 0.5) / beta).square(), scores, grades, list_mask, margins)


@OBJECTIVE.add
class Squared(Objective):
    """IPO."""

    formula = staticmethod(squared)
    properties = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False)
    trl = {
        "ipo": "{objective: {name: squared}, score: {name: log_ratio_mean}}",
        "cpo_ipo": "{objective: [{name: squared}, {name: sft}], score: {name: likelihood_mean, beta: 0.1}}",
    }

    name: Literal["squared"] = "squared"


def exo(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    label_smoothing: float = 1e-3,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """EXO on pairs: the reverse KL from the policy's preference to the smoothed label.

    q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps),  q = sigmoid(d)

    Args:
        scores, grades, list_mask, margins: see the module.
        label_smoothing: eps > 0, the probability that a preference is flipped.

    Returns:
        One loss per list, in nats; 0 for a list of ties.

    Source: EXO, arXiv:2402.00856, eq. 16; `exo_list` is the form for a whole list.
    """
    log_kept, log_flipped = math.log1p(-label_smoothing), math.log(label_smoothing)

    def loss(d: Tensor) -> Tensor:
        return d.sigmoid() * (F.logsigmoid(d) - log_kept) + (-d).sigmoid() * (F.logsigmoid(-d) - log_flipped)

    return over_ordered_pairs(loss, scores, grades, list_mask, margins)


@OBJECTIVE.add
class Exo(Objective):
    """EXO on ordered pairs."""

    formula = staticmethod(exo)
    properties = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False)
    trl = {"exo_pair": "{objective: {name: exo}}"}

    name: Literal["exo"] = "exo"
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Probability that a preference is flipped; 0 would make the loss infinite."""


def discopop(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    temperature: float = 0.05,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """DiscoPOP: a blend of logistic and exponential loss that an LLM search found.

    -(1 - m) log sigmoid(d) + m e^{-d},  m = sigmoid(d / temperature)

    Args:
        scores, grades, list_mask, margins: see the module.
        temperature: how sharply the blend changes at d = 0, at most 1.

    Returns:
        One loss per list; 0 for a list of ties.

    Source: DiscoPOP, arXiv:2406.08414, eq. 5.
    """

    def loss(d: Tensor) -> Tensor:
        mixed = d / temperature
        exponential = (F.logsigmoid(mixed) - d).exp()  # m e^{-d}, finite where e^{-d} alone is not
        return exponential - (-mixed).sigmoid() * F.logsigmoid(d)

    return over_ordered_pairs(loss, scores, grades, list_mask, margins)


@OBJECTIVE.add
class Discopop(Objective):
    """DiscoPOP."""

    formula = staticmethod(discopop)
    properties = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False)
    trl = {"discopop": "{objective: {name: discopop}}"}

    name: Literal["discopop"] = "discopop"
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.05
    """How sharply the blend of the two losses changes."""


def odds_ratio(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """ORPO's preference term: the odds of the better completion against those of the worse.

    -log sigmoid(o_i - o_j),  o = log(p / (1 - p)),  p = e^s

    Args:
        scores: mean log-probability of a token, at most 0 (`likelihood_mean` with beta 1; a recipe gives that itself).
        grades, list_mask, margins: see the module.

    Returns:
        One loss per list, in nats; 0 for a list of ties. Scores are held below -1e-6, where the odds are finite.

    Source: ORPO, arXiv:2403.07691, eqs. 4 and 7; its loss is `sft` plus 0.1 times this.
    """
    below_one = scores.masked_fill(~list_mask, -1).clamp(max=-1e-6)
    log_odds = below_one - torch.log(-torch.expm1(below_one))
    return over_ordered_pairs(lambda d: -F.logsigmoid(d), log_odds, grades, list_mask, margins)


@OBJECTIVE.add
class OddsRatio(Objective):
    """ORPO's odds-ratio term; combine it with `sft`."""

    formula = staticmethod(odds_ratio)
    properties = Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False, score="likelihood_mean")
    trl = {"orpo": "{objective: [{name: sft}, {name: odds_ratio, weight: 0.1}]}"}

    name: Literal["odds_ratio"] = "odds_ratio"
    score: LikelihoodMean = LikelihoodMean(beta=1.0)
    """Odds are those of the mean token probability."""


def partial_order(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    noise: Float[Tensor, "B K"] | None = None,
    margins: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """Rescue and RRHF: better tiers must not score below worse ones; within a tier nothing is asked.

    max(0, -d)

    Args:
        scores, grades, list_mask, margins: see the module; equal grades make a tier.
        noise: how far each score may be off by rounding, which decides no pair: the gradient jumps at d = 0.

    Returns:
        One loss per list, in nats; 0 for a list of ties.

    Source: Rescue, arXiv:2311.09136 (authors' code: weight 0.1 beside `sft` with `ties: first`);
    RRHF, arXiv:2304.05302.
    """
    places, gaps = settled(scores, list_mask, noise), differences(scores) - per_pair(margins, scores)
    below = places[:, :, None] < places[:, None, :]
    if margins is not None:
        below = below.where(margins[:, None, None] == 0, gaps < 0)
    return -gaps.masked_fill(~(ordered_pairs(grades, list_mask) & below), 0).sum(dim=(1, 2))


@OBJECTIVE.add
class PartialOrder(Objective):
    """Rescue and RRHF; combine it with `sft`."""

    formula = staticmethod(partial_order)
    properties = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False)

    name: Literal["partial_order"] = "partial_order"
    score: ScoreConfig | None = LikelihoodMean(beta=1.0)
    """Mean log-probability, as in both papers (Rescue: `length_power: 0.85`); null takes the recipe's score."""


def _smoothed(d: Tensor, eps: float, link: float) -> Tensor:
    return (1 - eps) * _linked(d, link) + eps * _linked(-d, link)


def _linked(d: Tensor, link: float) -> Tensor:
    """(1 - sigmoid(d)^q) / q, whose limit for q = 0 is the logarithm."""
    return -torch.expm1(link * F.logsigmoid(d)) / link if link else -F.logsigmoid(d)
