"""A scorer with what becomes of its rewards, and several scorers' rewards as one."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ValidationError

from align.section import Strict
from align.shipped import with_shipped_paths
from rewards.registry import ScorerConfig, check_function, faults, read_tree
from rewards.transforms import LSC_NEEDS, Lsc, Transform
from rewards.types import ScorerError

Combination = Literal["weighted_sum", "and"]


class Reward(Strict):
    """One scorer's part in the reward of a completion."""

    scorer: ScorerConfig
    transforms: tuple[Transform, ...] = ()
    """What happens to its rewards before they are combined, in this order."""
    weight: float = 1.0
    part: str | None = None
    """The name of its rewards among several; by default the scorer's."""


def read_reward(spec: Any, *, allow_code: bool = False) -> Reward:
    """A reward from what a user may write: a `Reward` as a mapping, YAML or a YAML file, or a scorer's specification.

    Args:
        allow_code: consent to a function that a file names although it may be a stranger's.

    Raises:
        ScorerError: an unknown or ill-typed key, or no YAML.
        UserError: a file names a function that nobody has consented to.

    Source: ours
    """
    try:
        reward = Reward.model_validate(keys_of(spec))
    except ValidationError as error:
        raise ScorerError(f"reward specification {spec!r}: {faults(error)}") from None
    check_function(reward.scorer, spec, allow_code=allow_code)
    return reward


def keys_of(spec: Any) -> Any:
    """The keys of a `Reward` that a specification gives, unchecked.

    Raises:
        ScorerError: no such file, or no YAML in it.

    Source: ours
    """
    tree = with_shipped_paths(read_tree(spec))
    return tree if isinstance(tree, dict) and "scorer" in tree else {"scorer": tree}


def transforms_for(rewards: Sequence[Reward], method: Combination) -> list[tuple[Transform, ...]]:
    """Each reward's transforms.

    Raises:
        ScorerError: for `and`, some that do not end with LSC: only log-probabilities add up to that of all together.

    Source: ours
    """
    steps = [reward.transforms for reward in rewards]
    for reward, own in zip(rewards, steps, strict=True):
        if method == "and" and not (own and isinstance(own[-1], Lsc)):
            raise ScorerError(
                f"`and` adds log-probabilities, so the transforms of {reward.part or reward.scorer.name} have to end "
                f"with lsc ({{scorer: ..., transforms: [{{name: lsc, ...}}]}}); {LSC_NEEDS}"
            )
    return steps


def combine(rewards: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """sum_k w_k r_k of each completion.

    Over rewards that LSC has made log P(good on k), with weights 1, this is log P(good on all): the logical AND.

    Args:
        rewards: of each scorer, after its transforms, one per completion.
        weights: of each scorer.

    Source: AND: LSC, arXiv:2402.00742
    """
    return [sum(w * r for w, r in zip(weights, column, strict=True)) for column in zip(*rewards, strict=True)]
