"""What a caller gives a run as objects, beside its recipe."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from align.errors import UserError
from align.runs.run_directory import RunDirectory
from align.training.hooks import Hooks

log = logging.getLogger("align")

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Given:
    """Objects that take the place of what the recipe would make, or that are told of a run."""

    hooks: Hooks = Hooks()
    callbacks: Sequence[TrainerCallback] = ()
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None = None
    """An optimizer of the model's parameters, or what makes one of those that train."""
    schedule: Callable[[Optimizer, int], Any] | None = None
    """Of the optimizer and the number of steps a learning-rate scheduler."""
    scorer: Any = None
    """Scores the samples."""
    model: PreTrainedModel | None = None
    """Is trained in place of loading `folder`."""
    folder: Path | None = None
    write: Callable[[RunDirectory], None] | None = None
    """Puts what the recipe names inside of the run's folder there; called by the main process, with the run open."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of what changes a run's numbers: name -> a digest of its code."""


def own_optimizer(given: Any, model: nn.Module) -> Optimizer:
    """The caller's optimizer, of parameters of the model that train.

    Raises:
        UserError: it is none, or of other parameters.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = given if isinstance(given, Optimizer) else _called("optimizer", given, trained)
    if not isinstance(made, Optimizer):
        raise UserError(
            f"optimizer: gives {type(made).__name__}, no torch.optim.Optimizer; give one, or a function of parameters"
        )
    known = {id(parameter) for parameter in trained}
    held = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    if held - known:
        raise UserError(
            f"optimizer: {len(held - known)} of its {len(held)} parameters are none that train here (an adapter is put "
            "in before training); give a function of the parameters, such as `lambda own: torch.optim.AdamW(own)`"
        )
    if known - held:
        log.info("the optimizer leaves out %d of the %d parameters that train", len(known - held), len(known))
    return made


def own_schedule(given: Callable[..., Any], optimizer: Any, steps: int) -> Any:
    """The caller's schedule of the learning rate.

    Raises:
        UserError: it gives none.
    """
    made = _called("schedule", given, optimizer, steps)
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler):
        raise UserError(f"schedule: gives {type(made).__name__}, no torch.optim.lr_scheduler.LRScheduler")
    return made


def _called(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        raise UserError(f"{name}: fails with {type(error).__name__}: {error}") from error


def takes(function: Any, count: int) -> bool:
    """Whether something can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except ValueError:  # of C, which says nothing of its arguments
        return callable(function)
    except TypeError:
        return False
    return True


def restore_callbacks(callbacks: Sequence[TrainerCallback], state: TrainerState) -> None:
    """Give callbacks that keep a state the one that a checkpoint has of them, by their class and order."""
    kept_states: Any = state.stateful_callbacks
    for name, stored in kept_states.items():
        own = [one for one in callbacks if isinstance(one, ExportableState) and type(one).__name__ == name]
        for callback, kept in zip(own, stored if isinstance(stored, list) else [stored], strict=False):
            for attribute, value in kept.get("attributes", {}).items():
                setattr(callback, attribute, value)
