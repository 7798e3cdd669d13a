"""Objectives: pure functions (scores [B, K], grades [B, K], list_mask [B, K], **options) -> losses [B].

An objective is one class beside its formula, in a module of this folder: the class is its section in a recipe, and
names the formula, what holds for it and what TRL calls it. The tables here are made of the classes. To add one, write
the formula and its class, and the formula written out for the contract test; a score function likewise, in `scores`.
Torch is imported when a formula is first called: a recipe is checked without it.
"""

from typing import TYPE_CHECKING

from align.objectives.base import SCORE, Properties, Score
from align.objectives.modifiers import dpop_penalty, wpo_list_weights, wpo_weights
from align.objectives.names import REFUSED, check_grades, check_score, pair_weights, trl_names, unknown_objective
from align.objectives.objective import OBJECTIVE, Objective, OwnObjective
from align.objectives.scores import ScoreConfig
from align.objectives.token_reg import token_regularizer
from align.registry import import_all

import_all(__name__, __path__)
OBJECTIVE.classes = dict(sorted(OBJECTIVE.classes.items()))  # found by name, in whichever module they stand

OBJECTIVES = OBJECTIVE.table("formula")
PROPERTIES: dict[str, Properties] = OBJECTIVE.table("properties")
TRL_NAMES = trl_names()
SCORES = SCORE.table("formula")
REFERENCE_FREE = frozenset(name for name, score in SCORE.classes.items() if not score.against_reference)

if TYPE_CHECKING:
    ObjectiveConfig = Objective
else:
    ObjectiveConfig = OBJECTIVE.union(OwnObjective)
    """Any objective's section, for use as a pydantic field."""

__all__ = [
    "OBJECTIVE",
    "OBJECTIVES",
    "PROPERTIES",
    "REFERENCE_FREE",
    "REFUSED",
    "SCORE",
    "SCORES",
    "TRL_NAMES",
    "Objective",
    "ObjectiveConfig",
    "Properties",
    "Score",
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
