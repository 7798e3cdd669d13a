"""What a run cannot do exactly on weights, gradients or optimizer states that are cut over processes, by strategy."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

from transformers import TrainingArguments

from align.errors import UserError
from align.model.adapters import Full
from align.model.middle_adapters import MIDDLES
from align.planning.devices import way_of
from align.recipe import Recipe

Strategy = Literal["fsdp2", "zero2", "zero3"]
ALL: tuple[Strategy, ...] = get_args(Strategy)
FSDP: tuple[Strategy, ...] = ("fsdp2",)
ZERO: tuple[Strategy, ...] = ("zero2", "zero3")
NAMES: dict[Strategy, str] = {"fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
ELEMENTWISE: dict[str, tuple[str, ...]] = {
    "transformers": ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"),
    "torch": ("adadelta", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "sgd"),
}
"""Optimizers, by source, that treat every weight alone, so that a part of a tensor moves as it does in the whole."""
BY_NORM: dict[str, tuple[str, ...]] = {"align": ("lamb",)}
"""Those that see tensors by their norms, which FSDP2's parts know of the whole; ZeRO's optimizers get flat pieces."""
SEES_PARTS = "it is none of those that treat every weight alone, and would see parts of tensors"


def _names(*optimizers: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(dict.fromkeys(name for table in optimizers for own in table.values() for name in own))


class Limit(NamedTuple):
    """Something that is refused under some strategies."""

    strategies: tuple[Strategy, ...]
    key: str
    why: str
    instead: str
    found: Callable[[Recipe, Any], bool]
    """Whether a recipe, with its loss, asks for it."""


def _full(recipe: Recipe) -> bool:
    return isinstance(recipe.policy.adapter, Full) and recipe.policy.start_adapter is None


def _needs_whole(recipe: Recipe, loss: Any) -> bool:
    own = recipe.train.optimizer
    return own.name not in ELEMENTWISE.get(own.of, ())


def _needs_more_than_norms(recipe: Recipe, loss: Any) -> bool:
    own = recipe.train.optimizer
    return _needs_whole(recipe, loss) and own.name not in BY_NORM.get(own.of, ())


LIMITS = (
    Limit(
        ALL,
        "policy.adapter",
        "adalora ranks directions by whole gradients",
        "use lora",
        lambda recipe, loss: recipe.policy.adapter.needs_steps,
    ),
    Limit(
        FSDP,
        "policy.adapter",
        "its factors are of whole weights, and were not tried on cut ones",
        "use lora",
        lambda recipe, loss: isinstance(recipe.policy.adapter, MIDDLES),
    ),
    Limit(
        ALL,
        "reference",
        "moving averages whole weights",
        "leave it out",
        lambda recipe, loss: recipe.reference.name == "moving",
    ),
    Limit(
        ALL,
        "reward.balance",
        "more compares whole gradients of the head",
        "use mean",
        lambda recipe, loss: recipe.task == "reward" and recipe.reward.balance == "more",
    ),
    Limit(
        FSDP,
        "objective",
        "kto's baseline needs the reference at every step, which full training would hold as a second model",
        "use lora",
        lambda recipe, loss: _full(recipe) and recipe.task != "reward" and loss.needs_baseline,
    ),
    Limit(
        FSDP,
        "reference.cache",
        "false makes full training hold a second model",
        "leave it out",
        lambda recipe, loss: _full(recipe) and not recipe.reference.cache,
    ),
    Limit(
        ("fsdp2", "zero3"),
        "policy.quantization",
        "4bit is not cut",
        "take recipes/accelerate/ddp.yaml or zero2.yaml, or policy.dtype: bfloat16 without quantization",
        lambda recipe, loss: recipe.policy.quantization is not None,
    ),
    Limit(ZERO, "train.optimizer", SEES_PARTS, f"take one of {_names(ELEMENTWISE)}", _needs_whole),
    Limit(FSDP, "train.optimizer", SEES_PARTS, f"take one of {_names(ELEMENTWISE, BY_NORM)}", _needs_more_than_norms),
)


def strategy_of(arguments: TrainingArguments) -> Strategy | None:
    """How the processes that were started cut a model; None where each holds all of it."""
    way = way_of(arguments)
    return next((own for own in ALL if own == way), None)


def check_strategy(recipe: Recipe, loss: Any, strategy: Strategy | None) -> None:
    """Refuse what would not be the same on what a strategy cuts.

    Raises:
        UserError: names the key and what goes instead.
    """
    for own in LIMITS:
        if strategy in own.strategies and own.found(recipe, loss):
            raise UserError(f"{own.key}: {own.why} under {NAMES[strategy]}; {own.instead}")  # type: ignore[index]
