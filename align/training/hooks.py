"""What a caller hears of while training goes on, and callbacks that a recipe names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from align.errors import UserError
from align.own_code import load_named
from align.packing.batch import Example
from align.types import ListBatch, TokenStats


@dataclass(frozen=True)
class ListsSeen:
    """Some of a step's lists as their loss saw them; tensors are copies without gradients, on the model's device."""

    step: int
    """The optimizer step that they are part of, from 1."""
    ids: tuple[str, ...]
    """The rows' ids, in the order of the lists."""
    places: tuple[str, ...]
    """Where each row was read: `file, row number`."""
    batch: ListBatch
    """Their tokens, grades, masks, margins and token weights; `list_index` and `slot` place completions in lists."""
    token_logprobs: Float[Tensor, "N C"] | None
    """The policy's log-probability of every learnt token, in nats; 0 beyond a completion's end, None for a reward
    model."""
    reference_logprobs: Float[Tensor, "N C"] | None
    """The reference's; None where nothing compares with it."""
    rewards: Float[Tensor, "N A"] | None
    """A reward model's outputs; None for a policy."""
    scores: Float[Tensor, "B K"]
    """The implicit rewards; 0 where `batch.list_mask` is False."""
    losses: Float[Tensor, " B"]
    """One for each list."""
    weights: Float[Tensor, " B"]
    """Each list's share of the step's loss; over all of a step's lists they sum to 1."""
    iteration: int | None = None
    """Of an online run, from 1; None where there are none."""


@dataclass(frozen=True)
class StepDone:
    """An optimizer step that was taken."""

    step: int
    """From 1."""
    steps: int
    """Of the whole run, as it is planned."""
    figures: dict[str, float]
    """Its line of metrics.jsonl: loss, gradient norm, learning rate, and what is measured of its lists."""
    iteration: int | None = None
    """Of an online run, from 1, whose steps these are; None where there are none."""


@dataclass(frozen=True)
class Hooks:
    """Functions that are called while training goes on; without them nothing is computed for them."""

    on_lists: Callable[[ListsSeen], Any] | None = None
    """After the loss of each micro-batch, in every process with its own lists."""
    on_step: Callable[[StepDone], Any] | None = None
    """After each optimizer step, in the main process."""
    iteration: int | None = None
    """Of the online run that they are called in."""

    def tell_lists(
        self,
        step: int,
        examples: Sequence[Example],
        batch: ListBatch,
        stats: TokenStats | Tensor,
        reference: Tensor | None,
        scores: Tensor,
        losses: Tensor,
        weights: Tensor,
    ) -> None:
        """Call `on_lists`."""
        of_policy = isinstance(stats, TokenStats)
        seen = ListsSeen(
            step=step,
            ids=tuple(str(example["id"]) for example in examples),
            places=tuple(f"{example['source']}, row {example['row']}" for example in examples),
            batch=batch,
            token_logprobs=_copy(stats.logprobs) if isinstance(stats, TokenStats) else None,
            reference_logprobs=_copy(reference) if of_policy and reference is not None else None,
            rewards=None if isinstance(stats, TokenStats) else _copy(stats),
            scores=_copy(scores),
            losses=_copy(losses),
            weights=_copy(weights),
            iteration=self.iteration,
        )
        self._call("on_lists", seen)

    def tell_step(self, step: int, steps: int, figures: dict[str, float]) -> None:
        """Call `on_step`."""
        self._call("on_step", StepDone(step, steps, dict(figures), self.iteration))

    def _call(self, name: str, event: Any) -> None:
        """A hook's random draws are its own: with it and without it training draws the same."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            try:
                getattr(self, name)(event)
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"{name}: fails in step {event.step} with {type(error).__name__}: {error}") from error


def load_callbacks(places: Sequence[str]) -> list[TrainerCallback]:
    """The callbacks that `train.callbacks` names.

    Raises:
        UserError: there is no such class, or what it gives is no callback.
    """
    return [_made(place) for place in places]


def _made(place: str) -> TrainerCallback:
    named = load_named(place)
    try:
        made = named() if callable(named) else named
    except Exception as error:
        raise UserError(
            f"train.callbacks: {place} cannot be made without arguments ({type(error).__name__}: {error}); name a "
            "function that makes it"
        ) from error
    if not isinstance(made, TrainerCallback):
        raise UserError(f"train.callbacks: {place} gives {type(made).__name__}, not a transformers.TrainerCallback")
    return made


def _copy(values: Tensor) -> Tensor:
    return values.detach().clone()
