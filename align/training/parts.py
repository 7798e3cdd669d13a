"""What a run on rows is made of, stage by stage: its rows, its policy with its lists, and its trainer."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import TrainingArguments

from align.data import Audit, Prepared, in_one_line, render
from align.data.ratings import with_ratings
from align.data.select import with_trained_places
from align.errors import UserError
from align.losses.reward_loss import (
    check_ratings,
    columns_read,
    deviation_field,
    set_of,
    strength_field,
)
from align.model.checkpointing import checkpoint_layers, layers_to_checkpoint
from align.model.checks import check_token_ids
from align.model.policy import Policy
from align.model.precision import hold_frozen
from align.model.reward import RewardModel, load_reward_model
from align.model.sharding import is_sharded, keep_stream_exact, read_sharding, shard, sharding_asked
from align.recipe import Recipe
from align.runs.build import build_policy, check_objectives, check_positions, load_options, prepare
from align.runs.log import is_one_of_many
from align.runs.record import hold_to_record, record_lists
from align.runs.run_directory import RunDirectory
from align.runs.start import start_from
from align.training.advice import advise
from align.training.annotate import Annotated, annotate_lists, filter_by_ches
from align.training.arguments import fit_to_plan, grow, planned_steps
from align.training.given import Given
from align.training.optimizers import check_parameters
from align.training.trainer import AlignTrainer

log = logging.getLogger("align")


@dataclass(frozen=True)
class Rows:
    """A run's rows as token ids."""

    prepared: Prepared
    rated: Annotated | None
    """Of a reward model: the lists with what its objectives learn from."""


@dataclass(frozen=True)
class RunParts:
    """What a run trains, measures and writes with."""

    recipe: Recipe
    run: RunDirectory
    prepared: Prepared
    annotated: Annotated
    """The lists with what frozen models say about them."""
    heldout: Dataset
    policy: Policy
    trainer: AlignTrainer


def read_rows(
    recipe: Recipe,
    run: RunDirectory,
    arguments: TrainingArguments,
    given: Given = Given(),  # noqa: B008, frozen
) -> Rows:
    """The recipe's rows, with ratings for a reward model; refused where the run has worked on others.

    Raises:
        UserError: the rows or the base model are not those that the run began with.
    """
    with arguments.main_process_first():
        prepared = prepare(recipe)
        rated = _rated(recipe, prepared) if recipe.task == "reward" else None
    if rated:
        check_ratings(rated.train, recipe.objective, recipe.reward.outputs)
    lists = rated or prepared
    parts = {"train": record_lists(lists.train), "heldout": record_lists(lists.heldout)}
    hold_to_record(run, recipe, parts, functions=given.digests, main=arguments.process_index == 0)
    return Rows(prepared, rated)


def _rated(recipe: Recipe, prepared: Prepared) -> Annotated:
    """The lists with what a reward model's objectives learn from."""
    names = recipe.reward.outputs
    fields = {"strength": strength_field(recipe.objective), "deviation": deviation_field(recipe.objective)}
    options: dict[str, Any] = {"names": names, **fields}
    sets = {name: set_of(name, recipe.data.sources) for name in set(prepared.train["source"][:])}
    lists = with_ratings(prepared.train, prepared.train_rows, sets=sets, **options)
    of_no_set = dict.fromkeys(prepared.heldout["source"][:], -1)
    heldout = with_ratings(prepared.heldout, prepared.heldout_rows, sets=of_no_set, **options)
    prepared.audit.mark_read(columns_read(recipe.objective, names))
    return Annotated(lists, heldout, {})


def assemble(
    recipe: Recipe,
    run: RunDirectory,
    arguments: TrainingArguments,
    rows: Rows,
    loss: Any,
    given: Given = Given(),  # noqa: B008, frozen
) -> RunParts:
    """The policy at its start, its lists and its trainer.

    Raises:
        UserError: the rows do not go with the objectives or the model.
    """
    prepared = rows.prepared
    check_objectives(recipe, prepared)
    check_positions(recipe, prepared)
    if arguments.process_index == 0:
        _show(prepared.audit)
    policy, annotated = _load(recipe, rows, loss, device=arguments.device)
    lists, heldout = filter_by_ches(recipe, prepared, annotated.train), _heldout(recipe, annotated)
    _check_measured(recipe, heldout)
    plan = _plan(recipe, run, lists, arguments)
    if arguments.process_index == 0:
        _advise(recipe, run, prepared.audit, steps=len(plan), lists=len(lists))
    start_from(recipe.policy.start_run, policy)
    trainer = AlignTrainer(
        policy=policy,
        loss=loss,
        lists=lists,
        plan=plan,
        heldout=heldout,
        run=run,
        section=recipe.train,
        args=arguments,
        given=given,
    )
    trainer.bad.rows = prepared.train_rows
    check_parameters(recipe.train, policy.scorer())
    _set_checkpointing(recipe, trainer)
    return RunParts(recipe, run, prepared, annotated, heldout, policy, trainer)


def _show(audit: Audit) -> None:
    if not is_one_of_many():
        Console(stderr=True).print(render(audit))
    log.debug("%s", in_one_line(audit))


def _load(recipe: Recipe, rows: Rows, loss: Any, *, device: torch.device) -> tuple[Policy, Annotated]:
    """The reward model and its rated lists, or the policy and the lists with what frozen models say about them."""
    prepared = rows.prepared
    recipe.policy.adapter.check_steps(len(planned_steps(recipe.train, prepared.train)))
    if rows.rated:
        model = _load_reward_model(recipe, prepared, device=device)
        _shard(recipe, model)
        return model, rows.rated
    # KTO's baseline needs the reference of completions that no cache holds.
    moving = recipe.reference.name == "moving"
    keep_reference = moving or loss.needs_baseline or not recipe.reference.cache
    steps = len(planned_steps(recipe.train, prepared.train))
    policy = build_policy(recipe, prepared, total_steps=steps, device=device, keep_reference=keep_reference)
    if moving:
        policy.follow(every=recipe.reference.every, mixture=recipe.reference.mixture)
    _shard(recipe, policy)
    return policy, annotate_lists(recipe, policy, prepared, reference=loss.needs_reference)


def _shard(recipe: Recipe, policy: Policy) -> None:
    """Cut the weights over the processes, where accelerate's configuration says so."""
    if sharding_asked() and not is_sharded(policy.scorer()):
        shard(policy.scorer(), read_sharding(recipe.train.precision))
        if recipe.train.precision == "bfloat16":
            keep_stream_exact(policy.model)


def _load_reward_model(recipe: Recipe, prepared: Prepared, *, device: torch.device) -> RewardModel:
    names = recipe.reward.outputs
    steps = len(planned_steps(recipe.train, prepared.train))
    options = load_options(recipe, prepared, total_steps=steps, device=device)
    model = load_reward_model(recipe.policy, options, outputs=names)
    check_token_ids(model.model, model.tokenizer, [prepared.train, prepared.heldout])
    if recipe.train.precision == "bfloat16":
        hold_frozen(model.model, torch.bfloat16)
    return model


def _heldout(recipe: Recipe, annotated: Annotated) -> Dataset:
    """The held-out lists, which know what training would keep of them."""
    data = recipe.data
    lists = with_trained_places(annotated.heldout, select=data.select, list_size=data.list_size, seed=recipe.train.seed)
    if "trained" in lists.column_names:
        log.info(
            "the held-out loss is of the completions that training would keep of a list; the rest is of whole lists"
        )
    return lists


def _check_measured(recipe: Recipe, heldout: Dataset) -> None:
    for key in ("keep_best", "early_stopping"):
        if getattr(recipe.train, key) and not len(heldout):
            raise UserError(
                f"train.{key}: no list is held out, so nothing says which policy is better; set data.eval_fraction, or "
                "give data.eval_sources"
            )


def _plan(recipe: Recipe, run: RunDirectory, lists: Dataset, arguments: TrainingArguments) -> list[list[int]]:
    """The lists of every step; a shorter run that is there becomes the beginning, or is refused."""
    plan = planned_steps(recipe.train, lists)
    fit_to_plan(arguments, recipe.train, steps=len(plan))
    if run.grows_from:
        grow(run, recipe, planned_steps(run.grows_from.train, lists), plan, main=arguments.process_index == 0)
        run.grows_from = None  # what it did is the beginning of this run
    return plan


def _advise(recipe: Recipe, run: RunDirectory, audit: Audit, *, steps: int, lists: int) -> None:
    """Advice, where a run begins."""
    if run.last_checkpoint() is None:
        for sentence in advise(audit, steps=steps, lists=lists, train=recipe.train, data=recipe.data):
            log.info("advice: %s", sentence)


def _set_checkpointing(recipe: Recipe, trainer: AlignTrainer) -> None:
    """Which layers compute again in the backward pass, the same on every process."""
    train, count = recipe.train, None
    if train.gradient_checkpointing == "auto":
        budget = train.activation_memory_gb * 1e9 if train.activation_memory_gb else None
        batch = trainer.policy.collate([trainer.lists[0]])
        with trainer.accelerator.autocast():
            count = layers_to_checkpoint(trainer.scorer, batch, tokens=train.batch_tokens, budget=budget)
        counts = trainer.accelerator.gather(torch.tensor([count], device=trainer.args.device))
        count = int(counts.max())
    if train.gradient_checkpointing and count != 0:
        checkpoint_layers(trainer.scorer.model, count)
