"""What the recipe's `train` section becomes: the lists of every step, and transformers' TrainingArguments."""

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, patch_environment
from datasets import Dataset
from transformers import TrainingArguments

from align.data.steps import plan_steps
from align.errors import UserError
from align.model.sharding import tell_accelerate
from align.recipe import Recipe
from align.recipe.settings import TrainSection
from align.runs.checkpoints import step_of
from align.runs.run_directory import RunDirectory
from align.runs.told import told_by_main
from align.training.processes import check_installed, check_processes
from align.training.schedules import rates
from align.training.zero import load_whole, zero_asked
from align.types import LONGEST_WAIT

log = logging.getLogger("align")


def planned_steps(train: TrainSection, lists: Dataset) -> list[list[int]]:
    """The rows of `lists` that each optimizer step trains on."""
    return plan_steps(
        lists["weight"][:],
        lists_per_step=train.lists_per_step,
        epochs=train.epochs,
        steps=train.steps,
        seed=train.seed,
    )


class Arguments(TrainingArguments):
    """TrainingArguments whose trackers are told the recipe too: they get whatever `to_dict` gives."""

    recipe_values: Mapping[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | dict(self.recipe_values)


def training_arguments(
    train: TrainSection, *, checkpoints: Path, run_name: str, recipe_values: Mapping[str, Any] | None = None
) -> TrainingArguments:
    """The section as transformers names it; `fit_to_plan` sets what depends on the data.

    Args:
        run_name: what trackers call the run.
        recipe_values: what they are told besides.
    """
    check_installed()
    on_cpu = not torch.accelerator.is_available()
    # accelerate passes over DeepSpeed where it is told of a CPU; without, it needs to be told how processes talk.
    zero_on_cpu = on_cpu and zero_asked() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    cpu = (on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")) and not zero_on_cpu
    backend = {"backend": "gloo"} if zero_on_cpu else {}
    # transformers makes this too, but on a CPU without a timeout.
    world = PartialState(cpu=cpu, timeout=LONGEST_WAIT, **backend)
    check_processes(world.num_processes, train.precision)
    # Without use_cpu transformers refuses bfloat16 there.
    options: dict[str, Any] = {"use_cpu": on_cpu and not zero_on_cpu, "ddp_backend": backend.get("backend")}
    with _named_without_a_number(cpu=cpu):
        arguments = _arguments(train, checkpoints=checkpoints, run_name=run_name, **options)
    load_whole()
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process with several GPUs splits each batch over them
    arguments.recipe_values = recipe_values or {}
    tell_accelerate(train.precision)  # last, as transformers forgets what accelerate was told before
    return arguments


def _named_without_a_number(*, cpu: bool) -> AbstractContextManager[None]:
    """accelerate calls each process's CPU cpu:0, cpu:1 and so on, where torch.load knows of no device."""
    return patch_environment(ACCELERATE_TORCH_DEVICE="cpu") if cpu else nullcontext()


def _arguments(train: TrainSection, *, checkpoints: Path, run_name: str, **options: Any) -> Arguments:
    return Arguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=1,  # of the data loader, whose items are whole optimizer steps
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule.name if train.schedule.name != "refined" else "linear",  # see create_scheduler
        optim=own.name if (own := train.optimizer).of == "transformers" else "adamw_torch",  # see create_optimizer
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        bf16=train.precision == "bfloat16",
        fp16=train.precision == "float16",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if train.eval_steps else "no",
        eval_steps=train.eval_steps,
        metric_for_best_model=train.keep_best or "loss",  # which callbacks of the user's own look at
        greater_is_better=train.keep_best not in (None, "loss"),
        save_strategy="steps",
        report_to=list(train.report_to) or "none",
        run_name=run_name,
        seed=train.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        label_names=[],
        project=train.project,
        **options,
    )


def grow(run: RunDirectory, recipe: Recipe, before: list[list[int]], plan: list[list[int]], *, main: bool) -> None:
    """Let a begun run become longer, where it has so far done what the longer one would have done.

    Args:
        before: the lists of every step of the shorter run.
        plan: likewise of the longer.

    Raises:
        UserError: says why it would have done other things.
    """
    adapter = recipe.policy.adapter
    if adapter.needs_steps:
        raise UserError(f"{run.path}: {adapter.name} plans its ranks by the number of steps, so the run may not grow")
    done = told_by_main(run.saved.whole)
    steps = [step_of(checkpoint) for checkpoint in done]
    longest = max(steps, default=0)
    old, new = (rates(recipe.train, total=len(one), steps=longest) or [] for one in (before, plan))  # by figures alone
    fitting = [c for c, s in zip(done, steps, strict=True) if before[:s] == plan[:s] and old[:s] == new[:s]]
    if done and not fitting:
        reason = f"the learning rate of a {recipe.train.schedule.name} schedule depends on how long the run is"
        if old == new:
            reason = "its last step was a smaller one; give train.steps"
        raise UserError(
            f"{run.path}: may not grow from {len(before)} to {len(plan)} steps: {reason}; a constant one may; "
            "give `output` another folder"
        )
    log.info("the run grows from %d to %d steps", len(before), len(plan))
    if main:
        run.grow(recipe, fitting[-1] if fitting else None)


def fit_to_plan(arguments: TrainingArguments, train: TrainSection, *, steps: int) -> None:
    """Set what depends on the number of optimizer steps."""
    arguments.max_steps = steps
    arguments.warmup_steps = math.ceil(train.warmup_ratio * steps)
    arguments.save_steps = train.save_steps or max(1, math.ceil(steps / 10))
