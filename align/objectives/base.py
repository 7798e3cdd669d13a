"""What every objective and every score function is: the bases of their classes, which a recipe's sections are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from align.registry import Registry
from align.section import Strict

GradeDomain = Literal["any", "unit", "nonnegative", "exponent", "relevance"]

DOMAINS: dict[GradeDomain, tuple[float, float]] = {
    "any": (float("-inf"), float("inf")),
    "unit": (0.0, 1.0),
    "nonnegative": (0.0, float("inf")),
    "exponent": (-64.0, 64.0),
    "relevance": (0.0, 64.0),
}
"""Range of grades by name; the last two are for gains 2^g, which must stay representable."""


GIVEN = ("baseline", "keys", "margins", "noise")
"""What the trainer gives to the functions that take it, which is no option: see `align.losses.list_loss`."""


@dataclass(frozen=True)
class Properties:
    """What holds for an objective with its default options; the contract test checks each claim."""

    shift_invariant: bool
    """Adding a constant to all scores of a list changes nothing: only score differences matter."""
    zero_when_tied: bool
    """A list whose grades are all equal has zero loss and zero gradient."""
    dpo_at_two: bool
    """On a list of two it is DPO's loss times a constant that depends on the grades alone."""
    min_list_size: int = 2
    max_list_size: int | None = None
    """2 where the objective is defined for pairs only."""
    grades: GradeDomain = "any"
    score: str | None = None
    """The one score function that it is defined for; None if any will do."""
    of_rewards: bool = False
    """A reward model's outputs can take the place of the scores."""


class Score(Strict):
    """Base of a score function's class, which is a recipe's `score`."""

    formula: ClassVar[Callable[..., Any]]
    """(policy_logprobs [N, C], reference_logprobs [N, C], completion_mask [N, C], list_index [N], **options) -> scores
    [N]; see `align.objectives.scores`."""
    against_reference: ClassVar[bool] = True
    """Whether it compares with the reference, which is None otherwise."""
    if TYPE_CHECKING:  # of every class, in the order that suits it
        name: str
        beta: float

    def load(self) -> Callable[..., Any]:
        """The function."""
        return type(self).formula

    def options(self) -> dict[str, Any]:
        """Its keywords."""
        return self.model_dump(exclude={"name"})

    @property
    def needs_reference(self) -> bool:
        """See `against_reference`."""
        return self.against_reference


SCORE: Registry[Score] = Registry("score")
