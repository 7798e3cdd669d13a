"""transformers' Trainer as a run directory needs it: a caller's own optimizer, checkpoints of what training changes."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from align.model.policy import Policy
from align.recipe.settings import TrainSection
from align.runs.run_directory import RunDirectory
from align.training.given import Given, own_optimizer, own_schedule, restore_callbacks
from align.training.optimizers import class_and_options, made_with, parameter_groups, read_back
from align.training.orthogonal import keep_orthogonal
from align.training.schedules import make_schedule
from align.training.sharded import PARTS, load_optimizer, save_optimizer, set_rates
from align.training.stopping import STOPPED, Ending
from align.training.zero import check_world, whole_weights


class CheckpointedTrainer(Trainer):
    """What AlignTrainer writes and reads to go on, in one process, in several, and with weights in parts."""

    run: RunDirectory
    section: TrainSection
    policy: Policy
    given: Given
    scorer: Any
    sharded: bool
    ending: Ending
    keep_checkpoints: int
    plan: Any
    """The rows of every optimizer step."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The caller's own optimizer, or the recipe's, of groups by rate and decay."""
        if self.given.optimizer and self.optimizer is None:
            self.optimizer = own_optimizer(self.given.optimizer, self.scorer)
        if self.optimizer is None:
            train, trained = self.section, self.scorer
            kind, options = class_and_options(train, self.args, steps=self.args.max_steps)
            groups = parameter_groups(train, trained, self.get_decay_parameter_names(trained))
            self.optimizer_cls_and_kwargs = made_with(train.optimizer, kind, options | {"params": groups})
            read_back()
        made = super().create_optimizer(model)
        if self.section.orthogonal_gradient:
            keep_orthogonal(made, cut=self.sharded or self.is_deepspeed_enabled)
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The caller's own schedule, or the recipe's."""
        if self.given.schedule and self.lr_scheduler is None:
            self.lr_scheduler = own_schedule(self.given.schedule, self.optimizer, len(self.plan))
        if self.lr_scheduler is None:
            made: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = make_schedule(self.section, made, steps=num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Seal the checkpoint once every process has written its part: a kill leaves an older one to go on from."""
        if self.args.should_save:
            checkpoint = self.run.saved.begin(self.state.global_step)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.ending.asked and self.state.global_step < len(self.plan):
                (checkpoint / STOPPED).touch()
            self.run.saved.end(checkpoint, keep=self.keep_checkpoints)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What training changed, for going on; sharded weights are gathered one by one, or all together under ZeRO-3,
        which takes every process."""
        with whole_weights(self.scorer):
            if self.sharded or self.args.should_save:
                self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.optimizer, self.scorer, Path(output_dir))
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and self.is_deepspeed_enabled:
            check_world(Path(checkpoint), self.args.world_size)
        if checkpoint is None or not (self.sharded or (Path(checkpoint) / PARTS).is_dir()):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.optimizer, self.scorer, Path(checkpoint))
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        set_rates(self.optimizer, scheduler)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.policy.save_state(Path(output_dir or self.run.checkpoints))

    def _load_callback_state(self) -> None:
        restore_callbacks(self.given.callbacks, self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_state(Path(resume_from_checkpoint))
        self.policy.load_moved(Path(resume_from_checkpoint))
