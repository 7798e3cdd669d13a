"""What an objective declares."""

from dataclasses import dataclass
from typing import Literal

GradeDomain = Literal["any", "unit", "nonnegative", "exponent", "relevance"]

DOMAINS: dict[GradeDomain, tuple[float, float]] = {
    "any": (float("-inf"), float("inf")),
    "unit": (0.0, 1.0),
    "nonnegative": (0.0, float("inf")),
    "exponent": (-64.0, 64.0),
    "relevance": (0.0, 64.0),
}
"""Range of grades by name; the last two are for gains 2^g, which must stay representable."""


GIVEN = ("baseline", "keys", "noise")
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
