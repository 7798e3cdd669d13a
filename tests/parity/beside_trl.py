"""A few optimizer steps of one of TRL's trainers and of ours, from the same weights on the same pairs."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from align.recipe import parse_recipe
from align.runs.build import loss_of
from align.runs.run_directory import RunDirectory
from align.training.arguments import training_arguments
from align.training.trainer import AlignTrainer

STEPS, PAIRS = 3, 4
"""Optimizer steps, and pairs of each."""
TARGETS = ("q_proj", "v_proj", "down_proj")
"""Layers that a LoRA is on."""


class Recorder(TrainerCallback):
    """Keeps every step's gradients."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})


def theirs(trainer_class, config_class, options: dict, output: Path, **of_trainer):
    """TRL's trainer, its losses and gradients, and the trainable weights before the first step."""

    class InOrder(trainer_class):
        """Takes the pairs in the order of the file."""

        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    arguments = config_class(
        output_dir=str(output),
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **options,
    )
    recorder = Recorder()
    trainer = InOrder(args=arguments, callbacks=[recorder], **of_trainer)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return trainer, losses, recorder.gradients, start


def ours(sections: dict, load, lists: list[dict], start: dict[str, torch.Tensor], output: Path, tokens_per_batch: int):
    """Our losses and gradients from TRL's weights, in several micro-batches a step.

    Args:
        sections: of the recipe.
        load: gives the model that trains, from the recipe.
        tokens_per_batch: few enough to cut a step.
    """
    train = {"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0}
    train |= {"tokens_per_batch": tokens_per_batch}
    tree = {"output": str(output), "data": {"sources": ["none"]}, "train": train}
    recipe = parse_recipe(tree | sections, origin="test")
    run = RunDirectory(recipe.output)
    run.open(recipe)
    policy = load(recipe)
    own = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert own.keys() == start.keys() and policy.packing
    for name, parameter in own.items():
        parameter.data.copy_(start[name])
    arguments = training_arguments(recipe.train, checkpoints=run.checkpoints, run_name="align")
    arguments.max_steps = STEPS
    trainer = AlignTrainer(
        policy=policy,
        loss=loss_of(recipe),
        lists=Dataset.from_list(lists),
        plan=[list(range(first, first + PAIRS)) for first in range(0, STEPS * PAIRS, PAIRS)],
        heldout=[],
        run=run,
        section=recipe.train,
        args=arguments,
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train_from(None, logging_steps=1)
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
    return losses, [{name.removeprefix("model."): g for name, g in step.items()} for step in recorder.gradients]


def assert_same_steps(losses, gradients, our_losses, our_gradients) -> None:
    """Every step has the same loss and, by name, the same gradients; the rounding of earlier steps moves later ones."""
    assert len(losses) == STEPS and len({round(x, 6) for x in losses}) == STEPS
    assert our_losses == pytest.approx(losses, abs=1e-5, rel=2e-6)
    for step, (their_step, our_step) in enumerate(zip(gradients, our_gradients, strict=True), start=1):
        assert their_step.keys() == our_step.keys()
        for name, gradient in their_step.items():
            allowed = step * 1e-5 * max(1.0, gradient.abs().max().item())
            assert_close(our_step[name], gradient, rtol=0, atol=allowed)
