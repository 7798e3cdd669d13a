"""The functions by name, and the checks that need tensors."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from align.errors import UserError
from align.objectives.aft import aft
from align.objectives.base import Properties
from align.objectives.checks import check_domain, check_score_fits
from align.objectives.chosen_rejected import apo_down, apo_zero, bco, nca, sppo
from align.objectives.lambda_loss import lambda_loss, lambda_weights
from align.objectives.lists import ordered_pairs
from align.objectives.listwise import exo_list, list_mle, softmax
from align.objectives.names import PROPERTIES, unknown_objective
from align.objectives.pairwise import discopop, exo, hinge, logistic, odds_ratio, partial_order, robust, squared
from align.objectives.pointwise import apo_zero_unpaired, kto, pointwise_mse, pointwise_sigmoid, sft
from align.objectives.policy_gradient import pl_policy_gradient
from align.objectives.score_config import ScoreConfig

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "aft": aft,
    "apo_down": apo_down,
    "apo_zero": apo_zero,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
    "discopop": discopop,
    "exo": exo,
    "exo_list": exo_list,
    "hinge": hinge,
    "kto": kto,
    "lambda": lambda_loss,
    "list_mle": list_mle,
    "logistic": logistic,
    "nca": nca,
    "odds_ratio": odds_ratio,
    "partial_order": partial_order,
    "pl_policy_gradient": pl_policy_gradient,
    "pointwise_mse": pointwise_mse,
    "pointwise_sigmoid": pointwise_sigmoid,
    "robust": robust,
    "sft": sft,
    "softmax": softmax,
    "sppo": sppo,
    "squared": squared,
}


def pair_weights(
    name: str,
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    noise: Float[Tensor, "B K"] | None = None,
    **options: Any,
) -> Float[Tensor, "B K K"]:
    """The weight that an objective gives to each ordered pair, without gradient.

    Delta_ij for `lambda`; for all others 1 where g_i > g_j, else 0

    Args:
        name: the objective's.
        scores, grades, list_mask: as for the objective.
        noise: how far each score may be off by rounding.
        options: the objective's; only those of `lambda` matter.

    Returns:
        Weights at (better, worse); all 0 for a list of ties.

    Raises:
        UserError: no objective has that name.

    Source: LiPO, arXiv:2402.01878, eq. 8; ours.
    """
    _properties(name)
    if name == "lambda":
        return lambda_weights(scores, grades, list_mask, noise=noise, **options)
    return ordered_pairs(grades, list_mask).to(scores.dtype)


def check_grades(name: str, grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"]) -> None:
    """Refuses lists that an objective cannot learn from; call it before training.

    Args:
        name: the objective's.
        grades: of the lists; anything where list_mask is False.
        list_mask: False marks padding.

    Raises:
        UserError: unknown objective, a list too short or too long, a grade not finite or out of its range.

    Source: ours.
    """
    check_domain(name, _properties(name), grades, list_mask)


def check_score(name: str, score: ScoreConfig) -> None:
    """Refuses a score function that an objective is not defined for; call it before training.

    Args:
        name: the objective's.
        score: the score function that it would get: its own, else the recipe's.

    Raises:
        UserError: unknown objective, another score than the one it needs, or a divergence where single scores count.

    Source: ours.
    """
    check_score_fits(name, _properties(name), score)


def _properties(name: str) -> Properties:
    if name not in PROPERTIES:
        raise UserError(unknown_objective(name))
    return PROPERTIES[name]
