"""The base of an objective's class, and the objective that is a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, PositiveFloat, PositiveInt

from align.objectives.base import Properties
from align.objectives.lists import ordered_pairs
from align.objectives.scores import ScoreConfig
from align.own_code import load_function, names_a_function, own_options, parameters
from align.registry import Registry
from align.section import Strict
from align.tensors import Bool, Float, Tensor


def equal_weights(
    scores: Float[Tensor, "B K"], grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"], **_: Any
) -> Float[Tensor, "B K K"]:
    """1 where g_i > g_j, else 0; see `align.objectives.pair_weights`."""
    return ordered_pairs(grades, list_mask).to(scores.dtype)


class Objective(Strict):
    """Keys that every objective has."""

    formula: ClassVar[Callable[..., Any]]
    """(scores [B, K], grades [B, K], list_mask [B, K], **options) -> losses [B]."""
    properties: ClassVar[Properties]
    trl: ClassVar[dict[str, str]] = {}
    """What TRL 1.16 calls it, alone or with others: its name -> our recipe keys."""
    pair_weights: ClassVar[Callable[..., Any]] = staticmethod(equal_weights)
    """What weight it gives each ordered pair; see `align.objectives.pair_weights`."""

    weight: PositiveFloat = 1.0
    """Factor in the sum where several objectives are combined."""
    score: ScoreConfig | None = None
    """A score function of its own; by default the recipe's."""
    if TYPE_CHECKING:  # of every class
        name: str

    def load(self) -> Callable[..., Any]:
        """The function."""
        return type(self).formula

    def options(self) -> dict[str, Any]:
        """Its keywords."""
        return self.model_dump(exclude={"name", "weight", "score"})

    @property
    def takes_margins(self) -> bool:
        """Whether the rows' `margin` means something to it."""
        return "margins" in inspect.signature(type(self).formula).parameters

    @property
    def holds(self) -> Properties:
        """What holds for it."""
        return self.properties


OBJECTIVE: Registry[Objective] = Registry("objective")


class OwnObjective(Objective):
    """A function of your own file, held to the contract before training; its other keys are the function's keywords."""

    model_config = ConfigDict(extra="allow")

    name: Literal["python"] = "python"
    function: Annotated[str, AfterValidator(names_a_function)]
    """`file.py:function`, from the current folder; training runs that file's code."""
    min_list_size: PositiveInt = 2
    """Fewest completions of a list that it takes."""
    max_list_size: PositiveInt | None = None
    """Most; 2 where it is defined for pairs only."""

    def load(self) -> Callable[..., Any]:
        """The function, checked.

        Raises:
            UserError: there is none, or it breaks the contract of an objective.
        """
        from align.objectives.contract import check_objective  # once it is asked for

        function = load_function(self.function)
        check_objective(function, self.function, self.holds, self.options())
        return function

    def options(self) -> dict[str, Any]:
        """The keys that are not ours, and those below `options`."""
        return own_options(self.model_extra)

    @property
    def takes_margins(self) -> bool:
        """See Objective."""
        return "margins" in parameters(self.function)

    @property
    def holds(self) -> Properties:
        """No more than what the contract asks for: a divergence, for one, needs an objective of differences."""
        return Properties(
            shift_invariant=False,
            zero_when_tied=False,
            dpo_at_two=False,
            min_list_size=self.min_list_size,
            max_list_size=self.max_list_size,
            of_rewards=True,
        )
