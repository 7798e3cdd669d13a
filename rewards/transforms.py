"""What may happen to rewards between a scorer and a trainer; every transform keeps ties among equal completions."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pstdev
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, model_validator

from align.section import Strict
from rewards.texts import plain
from rewards.types import ScorerError, Text


@dataclass(frozen=True)
class Statistics:
    """Of all rewards of a data set, before a transform."""

    mean: float
    std: float


class Column(Strict):
    """A column of the rows."""

    column: str
    """Each row's rewards of the reference policy's completions of its prompt: a list of numbers."""


class Samples(Strict):
    """Rows of the reference policy's own completions."""

    rows: str
    """What `align score` wrote of them with the same scorer; they are found by their prompts."""


class Lsc(Strict):
    """log sigma(r - reference) with a reference per prompt: rewards above it count ever less, those below it fully."""

    name: Literal["lsc"] = "lsc"
    reference: Literal["normal_quantile", "quantile", "mean", "fixed"] = "normal_quantile"
    """normal_quantile: of a normal distribution fitted to the prompt's rewards; quantile: of the rewards themselves."""
    of: Literal["own"] | Column | Samples | None = None
    """Whose rewards: the reference policy's, `{column: NAME}` or `{rows: FILE}`, in the unit that reaches lsc; or
    `own`, those of the list itself, which move with the policy that wrote it and say nothing about a list of one."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.85
    value: float = 0.0
    """The reference where it is fixed."""

    @model_validator(mode="after")
    def _source(self) -> "Lsc":
        if (self.reference == "fixed") != (self.of is None):
            raise ValueError(f"lsc: {LSC_NEEDS}")
        return self


class Standardize(Strict):
    """(r - mean) / standard deviation; equal rewards become 0."""

    name: Literal["standardize"] = "standardize"
    per: Literal["prompt", "dataset"] = "prompt"


class Clip(Strict):
    """The nearest value within bounds."""

    name: Literal["clip"] = "clip"
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _bounds(self) -> "Clip":
        if self.low is None and self.high is None:
            raise ValueError("clip: give `low`, `high` or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"clip: low ({self.low}) is above high ({self.high})")
        return self


class LengthPenalty(Strict):
    """r - weight * (words beyond `free`) / 100."""

    name: Literal["length_penalty"] = "length_penalty"
    weight: NonNegativeFloat = 0.1
    """What 100 words cost, in the reward's unit."""
    free: Annotated[int, Field(ge=0)] = 0
    """Words that cost nothing."""


LSC_NEEDS = (
    "say what the reward is held against: the reference policy's rewards, by `of: {column: NAME}` or "
    "`of: {rows: FILE}`, the list's own by `of: own`, or one number by `reference: fixed` and `value`"
)
Transform = Annotated[Lsc | Standardize | Clip | LengthPenalty, Field(discriminator="name")]


def transform(
    rewards: Sequence[float],
    completions: Sequence[Text],
    transforms: Sequence[Transform],
    statistics: Sequence[Statistics | None] = (),
    references: Sequence[Sequence[float] | None] = (),
) -> list[float]:
    """One prompt's rewards after transforms, applied in their order.

    Args:
        rewards: one per completion.
        completions: of the prompt; a length penalty reads them.
        transforms: what to apply.
        statistics: for each transform that standardises over the data set, those of the rewards that reach it;
            anything for the others, and nothing if there is no such transform.
        references: for each LSC whose `of` is not `own`, the reference policy's rewards of the prompt; likewise.

    Raises:
        ScorerError: LSC without the rewards it is held against, or a fit to the row's own reward alone.

    Source: ours
    """
    values = list(rewards)
    for place, step in enumerate(transforms):
        known = statistics[place] if place < len(statistics) else None
        values = _apply(values, completions, step, known, references[place] if place < len(references) else None)
    return values


def dataset_statistics(
    lists: Callable[[], Iterable[tuple[Sequence[float], Sequence[Text], Sequence[Sequence[float] | None]]]],
    transforms: Sequence[Transform],
) -> list[Statistics | None]:
    """Mean and standard deviation of the rewards that reach each transform that asks for the data set's.

    Args:
        lists: gives every prompt's rewards, completions and references, as often as it is called.
        transforms: one scorer's, in their order.

    Returns:
        What `transform` takes: None for the transforms that need none.

    Source: Welford (1962)
    """
    known: list[Statistics | None] = [None] * len(transforms)
    for place, step in enumerate(transforms):
        if isinstance(step, Standardize) and step.per == "dataset":
            known[place] = _moments(
                value
                for rewards, texts, references in lists()
                for value in transform(rewards, texts, transforms[:place], known, references)
            )
    return known


def lsc(rewards: Sequence[float], reference: float) -> list[float]:
    """log sigma(r - reference), in nats; sums over properties are log P(good on all).

    Source: arXiv:2402.00742
    """
    return [-_softplus(reference - reward) for reward in rewards]


def reference_reward(rewards: Sequence[float], kind: str, *, quantile: float = 0.85, value: float = 0.0) -> float:
    """The reward that counts as just good, from rewards of the reference policy's completions of one prompt.

    normal_quantile: mean + z std (std over the rewards, divided by their number); z = 1.036 at 0.85
    quantile: linearly between the two nearest rewards

    Source: arXiv:2402.00742 for the transform; the fitted 85th percentile: third-party code
    """
    if kind == "fixed":
        return value
    if kind == "mean":
        return fmean(rewards)
    if kind == "normal_quantile":
        return fmean(rewards) + NormalDist().inv_cdf(quantile) * pstdev(rewards)
    place = quantile * (len(rewards) - 1)
    ordered = sorted(rewards)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


def _apply(
    values: Sequence[float],
    completions: Sequence[Text],
    step: Transform,
    statistics: Statistics | None,
    reference: Sequence[float] | None,
) -> list[float]:
    own = step.of == "own" if isinstance(step, Lsc) else isinstance(step, Standardize) and step.per == "prompt"
    if own and len(values) == 1:
        raise ScorerError(f"{step.name} by a list's own rewards makes a single completion the same whatever its reward")
    if isinstance(step, Lsc):
        held_against = values if own else reference
        if held_against is None and step.reference != "fixed":
            raise ScorerError("lsc: the reference policy's rewards are not at hand here; take `reference: fixed`")
        return lsc(
            values, reference_reward(held_against or (), step.reference, quantile=step.quantile, value=step.value)
        )
    if isinstance(step, Clip):
        low, high = (-math.inf if step.low is None else step.low), (math.inf if step.high is None else step.high)
        return [min(max(value, low), high) for value in values]
    if isinstance(step, LengthPenalty):
        words = [len(plain(own).split()) for own in completions]
        return [v - step.weight * max(n - step.free, 0) / 100 for v, n in zip(values, words, strict=True)]
    known = statistics or Statistics(fmean(values), pstdev(values))
    return [(value - known.mean) / known.std if known.std else 0.0 for value in values]


def _moments(values: Iterable[float]) -> Statistics:
    """Mean and standard deviation (over the number of values) in one pass."""
    count, mean, squares = 0, 0.0, 0.0
    for value in values:
        count += 1
        change = value - mean
        mean += change / count
        squares += change * (value - mean)
    return Statistics(mean, math.sqrt(squares / count) if count else 0.0)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
