"""Objectives by name: what is asked of one that a caller names, and what to say of a name that is none."""

from __future__ import annotations

import difflib
from typing import Any

from align.errors import UserError
from align.objectives.base import Score
from align.objectives.checks import check_domain, check_score_fits
from align.objectives.objective import OBJECTIVE, Objective
from align.tensors import Bool, Float, Tensor

_SORTS = "it sorts across the batch, so its loss is no function of one list and would change with the batch size"
REFUSED: dict[str, str] = {
    "aot": f"`aot` is not provided: {_SORTS}; use `logistic` or `robust`",
    "aot_unpaired": f"`aot_unpaired` is not provided: {_SORTS}; use `logistic` or `bco`",
    "alphapo": "`alphapo` is not provided: use `logistic` with a margin on the score `likelihood_mean` (SimPO)",
}
"""Losses of TRL that no objective here stands for, and why."""


def trl_names() -> dict[str, str]:
    """What TRL 1.16 calls a loss, as our recipe keys; those missing here are in `REFUSED`.

    Raises:
        ValueError: two objectives claim one of its names.
    """
    claimed = [(trl, keys) for own in OBJECTIVE.classes.values() for trl, keys in own.trl.items()]
    if twice := {trl for trl, _ in claimed if sum(trl == other for other, _ in claimed) > 1}:
        raise ValueError(f"two objectives stand for TRL's {', '.join(sorted(twice))}")
    return dict(claimed)


def unknown_objective(name: str) -> str:
    """What to say to someone who asks for an objective that is not here: TRL's names are translated."""
    if name in trl_names():
        return f"TRL's `{name}` is {trl_names()[name]} here"
    names = sorted(OBJECTIVE.classes)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(names)}"
    return REFUSED.get(name, f"there is no objective `{name}`{hint}")


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
    return _named(name).pair_weights(scores, grades, list_mask, noise=noise, **options)


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
    check_domain(name, _named(name).properties, grades, list_mask)


def check_score(name: str, score: Score) -> None:
    """Refuses a score function that an objective is not defined for; call it before training.

    Args:
        name: the objective's.
        score: the score function that it would get: its own, else the recipe's.

    Raises:
        UserError: unknown objective, another score than the one it needs, or a divergence where single scores count.

    Source: ours.
    """
    check_score_fits(name, _named(name).properties, score)


def _named(name: str) -> type[Objective]:
    if name not in OBJECTIVE.classes:
        raise UserError(unknown_objective(name))
    return OBJECTIVE.classes[name]
