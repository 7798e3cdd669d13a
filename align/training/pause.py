"""Where training ends before its end: behind a step, with a checkpoint, all processes at the same one."""

import signal
import time
from typing import Any

import torch
from transformers import TrainerCallback

from align.stopping import Stopped, came, left

WRITES_PER_SECOND = 1e8
"""Bytes: how fast a checkpoint is expected to be written as long as none was."""
STATES = 12
"""Bytes of a checkpoint for each number that trains: itself and AdamW's two."""


class Pause(TrainerCallback):
    """Ends training behind a step on a signal to any of the processes, or before the time is over."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.number = 0
        """Of the signal by which all processes end; 0 for none."""
        numbers = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self.longest_save = numbers * STATES / WRITES_PER_SECOND
        self.longest_step = 0.0
        self.last = time.monotonic()

    def agree(self, bad: bool = False) -> bool:
        """All processes know what has come to any; costs one small reduction where there are several.

        Args:
            bad: whether this process's step is.

        Returns:
            Whether any process's is.
        """
        own = [came() or (int(signal.SIGALRM) if self._is_late() else 0), int(bad)]
        if self.trainer.args.world_size > 1:
            values = torch.tensor(own, device=self.trainer.args.device)
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
            own = values.tolist()
        self.number = own[0]
        return bool(own[1])

    def _is_late(self) -> bool:
        """Whether another step as long as any, and a checkpoint after it, would end too late."""
        return left() < self.longest_step + 2 * self.longest_save

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The time from the last step's end on counts: reading, evaluating and writing too."""
        now = time.monotonic()
        self.longest_step, self.last = max(self.longest_step, now - self.last), now
        if self.trainer.args.world_size == 1:  # several have agreed before the optimizer's step
            self.agree()
        self._end(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Held-out lists take long, so that a signal is looked for behind them too."""
        self.evaluated = time.monotonic()
        self.agree()
        self._end(control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        began = max(self.last, getattr(self, "evaluated", 0.0))
        self.longest_save = max(self.longest_save, time.monotonic() - began)

    def _end(self, control: Any) -> None:
        if self.number:
            control.should_save = control.should_training_stop = True

    def check(self) -> None:
        """Raises:
        Stopped: training has ended early; its checkpoint is written.
        """
        if self.number:
            step, steps = self.trainer.state.global_step, len(self.trainer.plan)
            where = f" after step {step} of {steps}, whose checkpoint is written"
            raise Stopped(self.number, where, together=True)
