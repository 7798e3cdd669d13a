"""Objectives of reward models, as a recipe gives them; the losses are in `heads`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from align.section import Strict

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
    """Of `soft_bins` and `fidelity`: how far raters differ about one completion, in the ratings' unit."""
    deviation_field: str = "deviations"
    """The rows' column of such deviations, where they are known: a number per completion, or an object of them by the
    attribute's name; `deviation` where it says nothing."""
    fidelity: Annotated[float, Field(ge=0)] = 0.0
    """Weight of Thurstone's pair probabilities on each attribute, for lists of rated completions."""

    @model_validator(mode="after")
    def _deviation_counts(self) -> "Attributes":
        given = (self.deviation, self.deviation_field) != (1.0, "deviations")
        if given and self.form == "squared" and not self.fidelity:
            raise ValueError(
                "deviation and deviation_field are read by `form: soft_bins` and by `fidelity`; set one of them, or "
                "remove the deviation"
            )
        return self


RewardObjective = BradleyTerry | Attributes
