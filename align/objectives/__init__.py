"""Objectives: pure functions (scores [B, K], grades [B, K], list_mask [B, K], **options) -> losses [B].

`OBJECTIVES` names the functions, `PROPERTIES` what holds for each, `ObjectiveConfig` their recipe sections. To add one,
write a function in a module here, its section in `config`, and a line in each of the three tables (`functions`,
`names`, `config`). What needs torch is imported when it is asked for: a recipe is checked without it.
"""

from typing import TYPE_CHECKING

from align.lazy import lazily
from align.objectives.base import Properties
from align.objectives.config import Objective, ObjectiveConfig
from align.objectives.names import PROPERTIES, REFUSED, TRL_NAMES, unknown_objective
from align.objectives.score_config import REFERENCE_FREE, ScoreConfig

if TYPE_CHECKING:
    from align.objectives.functions import OBJECTIVES, check_grades, check_score, pair_weights
    from align.objectives.modifiers import dpop_penalty, wpo_list_weights, wpo_weights
    from align.objectives.scores import SCORES
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

__getattr__ = lazily(
    __name__,
    {
        "functions": ("OBJECTIVES", "check_grades", "check_score", "pair_weights"),
        "modifiers": ("dpop_penalty", "wpo_list_weights", "wpo_weights"),
        "scores": ("SCORES",),
        "token_reg": ("token_regularizer",),
    },
)
