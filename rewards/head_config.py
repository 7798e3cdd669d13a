"""Objectives of reward models, as a recipe gives them; the losses are in `heads`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from rewards.types import Strict

Strength = Literal["none", "margin", "scaled"]


class _Term(Strict):
    weight: PositiveFloat = 1.0
    """Factor in the sum where several objectives are combined."""


class BradleyTerry(_Term):
    """Pairs: the better completion's reward should be higher."""

    name: Literal["bradley_terry"] = "bradley_terry"
    strength: Strength = "none"
    """`margin`: rewards should be m apart; `scaled`: a pair counts m times."""
    strength_field: str = "margin"
    """The rows' column that holds m; a row without it takes the gap of the two grades."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Weight of (r_i + r_j)^2, which keeps rewards near 0 (0.01 is usual)."""
    output: str | None = None
    """The output that is the reward; by default the first."""


class Attributes(_Term):
    """Regression of outputs on the attributes of the same names."""

    name: Literal["attributes"] = "attributes"
    form: Literal["squared", "soft_bins"] = "squared"
    """`soft_bins` learns a distribution over the levels 1 .. 5 and needs ratings in that range."""
    deviation: PositiveFloat = 1.0
    """Of `soft_bins`: how far raters differ about one completion, in levels."""
    fidelity: Annotated[float, Field(ge=0)] = 0.0
    """Weight of Thurstone's pair probabilities on each attribute, for lists of rated completions."""


RewardObjective = BradleyTerry | Attributes
