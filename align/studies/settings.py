"""What a study's file says, as sections."""

from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator

from align.section import Strict


class Halving(Strict):
    """Successive halving: all arms train for a share of the steps, the best go on to a larger share."""

    eta: Annotated[int, Field(ge=2)] = 3
    """One in so many arms stays, and trains so many times as long."""
    by: str
    """The held-out figure that decides, such as `pair_accuracy`."""


class Study(Strict):
    """A recipe under several settings, each with several seeds."""

    recipe: str
    """The recipe's file, or the name of one that ships."""
    output: str
    """The study's folder."""
    set: dict[str, Any] = {}
    """Recipe keys for all runs: dotted key -> value."""
    vary: Annotated[dict[str, dict[str, Any] | list[Any]], Field(min_length=1)]
    """An arm's name -> its recipe keys, or a recipe key -> its values. Several keys with values are a grid; arms by
    name are crossed with it."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    """Values of `train.seed`; a number alone is so many, from 0 on."""
    baseline: str | None = None
    """The arm that the others are compared with, seed by seed; by default the first."""
    figures: tuple[str, ...] = ()
    """Held-out figures of the table and the plot, the most important first; by default four that runs are judged by."""
    halving: Halving | None = None

    @field_validator("seeds", mode="before", json_schema_input_type=PositiveInt | tuple[int, ...])
    @classmethod
    def _so_many(cls, value: Any) -> Any:
        return tuple(range(value)) if type(value) is int and value > 0 else value

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("give one seed or more, each once")
        return value
