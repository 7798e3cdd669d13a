"""How fast this machine takes a recipe's steps: some passes and an update, run."""

import time
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from align.data import Prepared
from align.data.steps import micro_batches
from align.model.checkpointing import checkpoint_layers
from align.model.reward import load_reward_model
from align.planning.lengths import cells
from align.planning.plan import Plan
from align.progress import stage
from align.recipe import Recipe
from align.recipe.optimizers import AVERAGING, LOW_RANK
from align.runs.build import build_policy, load_options
from align.types import ListBatch

PASSES = 2
"""That are timed together, at most."""


@stage("measuring a step of this machine")
def measured_rate(recipe: Recipe, prepared: Prepared, plan: Plan) -> float:
    """Operations per second of a step: of passes over some of the rows, and of the optimizer's update after them.

    The model is loaded for it, on the first GPU or the CPU.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = _model(recipe, prepared, plan, device)
    count = min(len(prepared.train), recipe.train.lists_per_step)
    lists = prepared.train.select(range(0, len(prepared.train), len(prepared.train) // count)).to_list()[:count]
    options: dict[str, Any] = {"tokens_per_batch": recipe.train.batch_tokens, "packed": policy.packing}
    passes = micro_batches(lists, **options)[:PASSES]
    batches = [policy.collate(own) for own in passes]
    scorer = policy.scorer().train()
    if plan.checkpointed:
        checkpoint_layers(policy.model, plan.checkpointed)
    seconds = min(_seconds(scorer, batches, recipe, device) for _ in range(2))
    read = sum(cells(own, packed=policy.packing) for own in passes)
    whole = plan.steps * plan.devices.count
    step = seconds * plan.tokens / whole / read + _update(scorer, recipe, device)
    return plan.operations["training"] / whole / step


def _model(recipe: Recipe, prepared: Prepared, plan: Plan, device: torch.device) -> Any:
    steps: dict[str, Any] = {"total_steps": plan.steps, "device": device}
    if recipe.task == "reward":
        options = load_options(recipe, prepared, **steps)
        return load_reward_model(recipe.policy, options, outputs=recipe.reward.outputs)
    return build_policy(recipe, prepared, **steps, keep_reference=False)


def _seconds(scorer: nn.Module, batches: list[ListBatch], recipe: Recipe, device: torch.device) -> float:
    dtype = getattr(torch, recipe.train.precision)
    scorer.zero_grad()
    began = time.monotonic()
    for batch in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = scorer(batch)
        (found if isinstance(found, torch.Tensor) else found.logprobs).sum().backward()
    return _since(began, device)


def _update(scorer: nn.Module, recipe: Recipe, device: torch.device) -> float:
    """Seconds of the second update: the first one makes the optimizer's states."""
    own = recipe.train.optimizer
    like_adamw = own.of != "transformers" or own.name in (*LOW_RANK, *AVERAGING)  # made by align.training alone
    name = "adamw_torch" if like_adamw else own.name
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("unused", optim=name))
    optimizer = kind([parameter for parameter in scorer.parameters() if parameter.requires_grad], **options)
    optimizer.step()
    began = time.monotonic()
    optimizer.step()
    return _since(began, device)


def _since(began: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began
