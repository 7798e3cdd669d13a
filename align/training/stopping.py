"""When training ends before its last step: by the held-out figures, or because a callback says so."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from align.recipe.settings import EarlyStopping
from align.training.pause import Pause

ASKED = ("should_training_stop", "should_save", "should_evaluate")
STOPPED = "stopped"
"""File whose presence says that training ended with a checkpoint, although its plan goes on."""


class Patience:
    """The held-out figures so far, and whether they say that training is over."""

    def __init__(self, section: EarlyStopping, *, keep_best: str | None) -> None:
        self.section = section
        self.figure = section.figure or keep_best or "loss"
        self.values: list[float] = []

    def begin(self, lines: Iterable[dict[str, Any]], step: int) -> None:
        """Take over the evaluations up to a step, from lines of metrics.jsonl."""
        name = f"eval_{self.figure}"
        self.values = [line[name] for line in lines if name in line and line["step"] <= step]

    def is_over(self, value: float) -> bool:
        """Whether this evaluation is the last: none of the last `patience` was better than all before them."""
        self.values.append(value)
        return evaluations_without_gain(self.values, self.section.threshold, self.figure) >= self.section.patience


def evaluations_without_gain(values: Sequence[float], threshold: float, figure: str) -> int:
    """How many evaluations in a row, up to the last, did not better the best before them by more than `threshold`."""
    sign = -1.0 if figure == "loss" else 1.0
    best, since = -float("inf"), 0
    for value in (sign * value for value in values):
        since = 0 if value - best > threshold else since + 1
        best = value if since == 0 else best
    return since


class Ending(TrainerCallback):
    """Keeps the last state of a training that a callback or the held-out figures end early.

    It comes behind the user's callbacks and before what pauses a run, whose rest is still to be trained.
    """

    def __init__(self, pause: Pause, *, told: bool) -> None:
        """Args:
        told: whether callbacks of the user's may ask for something, in one of several processes too.
        """
        self.pause = pause
        self.told = told
        self.asked = False
        """Whether training is over."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.told and args.world_size > 1:
            _agree(control, args.device)
        if control.should_training_stop and not self.pause.number:
            self.asked = control.should_save = True

    on_evaluate = on_step_end


def _agree(control: Any, device: torch.device) -> None:
    """What callbacks ask for in one process, all do: to stop, save and evaluate take all of them."""
    asked = torch.tensor([int(getattr(control, name)) for name in ASKED], device=device)
    torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
    for name, value in zip(ASKED, asked.tolist(), strict=True):
        setattr(control, name, bool(value))


def was_stopped(checkpoint: Path | None) -> bool:
    """Whether training had ended with a checkpoint."""
    return checkpoint is not None and (checkpoint / STOPPED).exists()
