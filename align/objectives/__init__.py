"""Objectives: pure functions (scores [B, K], grades [B, K], list_mask [B, K], **options) -> losses [B].

`OBJECTIVES` names the functions, `PROPERTIES` what holds for each, `ObjectiveConfig` their recipe sections. To add one,
write function and config in a module here and a line in each of the three tables.
"""

import difflib
from collections.abc import Callable
from typing import Annotated, Any

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from align.errors import UserError
from align.objectives.aft import Aft, aft
from align.objectives.base import Objective, Properties
from align.objectives.checks import check_domain, check_score_fits
from align.objectives.chosen_rejected import (
    ApoDown,
    ApoZero,
    Bco,
    Nca,
    Sppo,
    apo_down,
    apo_zero,
    bco,
    nca,
    sppo,
)
from align.objectives.lambda_loss import Lambda, lambda_loss, lambda_weights
from align.objectives.lists import ordered_pairs
from align.objectives.listwise import ExoList, ListMle, Softmax, exo_list, list_mle, softmax
from align.objectives.modifiers import dpop_penalty, wpo_list_weights, wpo_weights
from align.objectives.pairwise import (
    Discopop,
    Exo,
    Hinge,
    Logistic,
    OddsRatio,
    PartialOrder,
    Robust,
    Squared,
    discopop,
    exo,
    hinge,
    logistic,
    odds_ratio,
    partial_order,
    robust,
    squared,
)
from align.objectives.pointwise import (
    ApoZeroUnpaired,
    Kto,
    PointwiseMse,
    PointwiseSigmoid,
    Sft,
    apo_zero_unpaired,
    kto,
    pointwise_mse,
    pointwise_sigmoid,
    sft,
)
from align.objectives.policy_gradient import PlPolicyGradient, pl_policy_gradient
from align.objectives.scores import REFERENCE_FREE, SCORES, ScoreConfig
from align.objectives.token_reg import token_regularizer

__all__ = [
    "OBJECTIVES",
    "PROPERTIES",
    "REFERENCE_FREE",
    "REFUSED",
    "SCORES",
    "TRL_NAMES",
    "Objective",
    "ObjectiveConfig",
    "Properties",
    "ScoreConfig",
    "check_grades",
    "check_score",
    "dpop_penalty",
    "pair_weights",
    "token_regularizer",
    "unknown_objective",
    "wpo_list_weights",
    "wpo_weights",
]

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

_MARGINS = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False)
_POINTS = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False)
_SPLIT = Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False)
_SINGLE = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, min_list_size=1)

PROPERTIES: dict[str, Properties] = {
    "aft": _MARGINS,
    "apo_down": Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False, max_list_size=2),
    "apo_zero": _SPLIT,
    "apo_zero_unpaired": _SINGLE,
    "bco": _SPLIT,
    "discopop": _MARGINS,
    "exo": _MARGINS,
    "exo_list": Properties(shift_invariant=True, zero_when_tied=False, dpo_at_two=False),
    "hinge": _MARGINS,
    "kto": _SINGLE,
    "lambda": Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=True, grades="exponent"),
    "list_mle": Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=True),
    "logistic": Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=True),
    "nca": _POINTS,
    "odds_ratio": Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False, score="likelihood_mean"),
    "partial_order": _MARGINS,
    "pl_policy_gradient": Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False, grades="relevance"),
    "pointwise_mse": _POINTS,
    "pointwise_sigmoid": Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, grades="unit"),
    "robust": _MARGINS,
    "sft": _SINGLE,
    "softmax": Properties(shift_invariant=True, zero_when_tied=False, dpo_at_two=False, grades="nonnegative"),
    "sppo": Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, grades="unit"),
    "squared": _MARGINS,
}

ObjectiveConfig = Annotated[
    Aft
    | ApoDown
    | ApoZero
    | ApoZeroUnpaired
    | Bco
    | Discopop
    | Exo
    | ExoList
    | Hinge
    | Kto
    | Lambda
    | ListMle
    | Logistic
    | Nca
    | OddsRatio
    | PartialOrder
    | PlPolicyGradient
    | PointwiseMse
    | PointwiseSigmoid
    | Robust
    | Sft
    | Softmax
    | Sppo
    | Squared,
    Field(discriminator="name"),
]

_SORTS = "it sorts across the batch, so its loss is no function of one list and would change with the batch size"
REFUSED: dict[str, str] = {
    "aot": f"`aot` is not provided: {_SORTS}; use `logistic` or `robust`",
    "aot_unpaired": f"`aot_unpaired` is not provided: {_SORTS}; use `logistic` or `bco`",
    "alphapo": "`alphapo` is not provided: use `logistic` with a margin on the score `likelihood_mean` (SimPO)",
}

TRL_NAMES: dict[str, str] = {
    "sigmoid": "{objective: {name: logistic}}",
    "hinge": "{objective: {name: hinge}}",
    "ipo": "{objective: {name: squared}, score: {name: log_ratio_mean}}",
    "exo_pair": "{objective: {name: exo}}",
    "nca_pair": "{objective: {name: nca}}",
    "robust": "{objective: {name: robust}}",
    "bco_pair": "{objective: {name: bco}}",
    "sppo_hard": "{objective: {name: sppo}}",
    "apo_zero": "{objective: {name: apo_zero}}",
    "apo_down": "{objective: {name: apo_down}}",
    "discopop": "{objective: {name: discopop}}",
    "sft": "{objective: {name: sft}}",
    "sigmoid_norm": "{objective: {name: logistic}, score: {name: log_ratio_mean}}",
    "kto": "{objective: {name: kto}}",
    "apo_zero_unpaired": "{objective: {name: apo_zero_unpaired}}",
    "cpo_sigmoid": "{objective: [{name: logistic}, {name: sft}], score: {name: likelihood}}",
    "cpo_hinge": "{objective: [{name: hinge}, {name: sft}], score: {name: likelihood}}",
    "cpo_ipo": "{objective: [{name: squared}, {name: sft}], score: {name: likelihood_mean, beta: 0.1}}",
    "simpo": "{objective: {name: logistic, margin: 0.5}, score: {name: likelihood_mean, beta: 2.0}}",
    "orpo": "{objective: [{name: sft}, {name: odds_ratio, weight: 0.1}]}",
}
"""What TRL 1.16 calls a loss, as our recipe keys; those missing here are in `REFUSED`."""


def pair_weights(
    name: str,
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    **options: Any,
) -> Float[Tensor, "B K K"]:
    """The weight that an objective gives to each ordered pair, without gradient.

    Delta_ij for `lambda`; for all others 1 where g_i > g_j, else 0

    Args:
        name: the objective's.
        scores, grades, list_mask: as for the objective.
        options: the objective's; only those of `lambda` matter.

    Returns:
        Weights at (better, worse); all 0 for a list of ties.

    Raises:
        UserError: no objective has that name.

    Source: LiPO, arXiv:2402.01878, eq. 8; ours.
    """
    _properties(name)
    if name == "lambda":
        return lambda_weights(scores, grades, list_mask, **options)
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


def unknown_objective(name: str) -> str:
    """What to say to someone who asks for an objective that is not here: TRL's names are translated."""
    if name in TRL_NAMES:
        return f"TRL's `{name}` is {TRL_NAMES[name]} here"
    near = difflib.get_close_matches(name, OBJECTIVES, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(OBJECTIVES)}"
    return REFUSED.get(name, f"there is no objective `{name}`{hint}")


def _properties(name: str) -> Properties:
    if name not in PROPERTIES:
        raise UserError(unknown_objective(name))
    return PROPERTIES[name]
