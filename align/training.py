"""The recipe's `train` section, and what it becomes: the lists of every step, and transformers' TrainingArguments."""

import difflib
import importlib.util
import math
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from align.data.steps import plan_steps
from align.types import LONGEST_WAIT, Fraction, Strict


class TrainSection(Strict):
    """How long, how fast, and what is kept."""

    learning_rate: PositiveFloat = 5e-5
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the learning rate rises."""
    optimizer: str = "adamw_torch"
    """Any optimizer name of transformers.TrainingArguments (adafactor, paged_adamw_8bit, ...)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 turns that off."""
    epochs: PositiveFloat = 1.0
    steps: PositiveInt | None = None
    """Optimizer steps; takes the place of `epochs`."""
    lists_per_step: PositiveInt = 32
    """Lists of one optimizer step, over all processes: the statistical batch size."""
    tokens_per_batch: PositiveInt = 8192
    """Tokens of one forward pass at most, as the model reads them; changes memory and speed, not the result."""
    packing: bool = True
    """Run a list as one row, its prompt once, where the model allows; off: every completion in a padded row."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast of the forward pass; bfloat16 with float32 weights is mixed precision."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time; auto: of as few layers as
    `activation_memory_gb` asks for."""
    activation_memory_gb: PositiveFloat | None = None
    """Memory for what the layers keep for the backward pass; by default most of what is free on the device."""
    dropout: bool = False
    """Keep the model's own dropout while training. An adapter's dropout is honoured either way."""
    logging_steps: PositiveInt = 1
    """Steps between lines on the terminal; metrics.jsonl gets every step."""
    eval_steps: PositiveInt | None = None
    """Steps between evaluations on the held-out lists; they always run before and after training."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints; by default about ten in a run."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept; older ones are removed."""
    keep_best: Literal["loss", "pair_accuracy", "ndcg", "kendall_tau", "top1_agreement"] | None = None
    """Export the checkpoint that was best by this held-out figure, not the last; needs `eval_steps`."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides the run directory."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random choice of the run follows from it."""
    threads: PositiveInt | None = None
    """Torch threads on a CPU; by default torch's choice. Models of a few million parameters are fastest with 1."""

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        names = [name.value for name in OptimizerNames]
        if value not in names:
            near = difflib.get_close_matches(value, names, n=1) or ["adamw_torch"]
            raise ValueError(f"transformers has no optimizer `{value}`; did you mean `{near[0]}`?")
        return value

    @field_validator("report_to")
    @classmethod
    def _installed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"{name} is not installed; run `pip install {name}`, or take it out")
        return value


def planned_steps(train: TrainSection, lists: Dataset) -> list[list[int]]:
    """The rows of `lists` that each optimizer step trains on."""
    return plan_steps(
        lists["weight"][:],
        lists_per_step=train.lists_per_step,
        epochs=train.epochs,
        steps=train.steps,
        seed=train.seed,
    )


def training_arguments(train: TrainSection, *, checkpoints: Path, run_name: str) -> TrainingArguments:
    """The section as transformers names it; `fit_to_plan` sets what depends on the data."""
    on_cpu = not torch.accelerator.is_available()
    # transformers makes this too, but on a CPU without a timeout.
    PartialState(cpu=on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=1,  # of the data loader, whose items are whole optimizer steps
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        optim=train.optimizer,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        use_cpu=on_cpu,  # else bf16 is refused there
        bf16=train.precision == "bfloat16",
        fp16=train.precision == "float16",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if train.eval_steps else "no",
        eval_steps=train.eval_steps,
        save_strategy="steps",
        report_to=list(train.report_to) or "none",
        run_name=run_name,
        seed=train.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        label_names=[],
    )


def fit_to_plan(arguments: TrainingArguments, train: TrainSection, *, steps: int) -> None:
    """Set what depends on the number of optimizer steps."""
    arguments.max_steps = steps
    arguments.warmup_steps = math.ceil(train.warmup_ratio * steps)
    arguments.save_steps = train.save_steps or max(1, math.ceil(steps / 10))
