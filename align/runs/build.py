"""A recipe's sections become objects: token ids, losses and models."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data import Prepared, Wanted, prepare_data, read_chat_template
from align.data.columns import how_to_ignore
from align.data.contrast import Templates
from align.data.row_numbers import MARGIN
from align.data.steps import micro_batches
from align.data.windows import in_rows, lengths, windows
from align.errors import UserError
from align.losses.list_loss import ListLoss, build_loss, likelihood_loss
from align.losses.reward_loss import RewardLoss, build_reward_loss, ranks
from align.model.adapters import Full
from align.model.by_part import load_by_part
from align.model.checks import check_token_ids
from align.model.config import ContrastSection, PolicySection
from align.model.load import LoadOptions, load_tokenizer, positions
from align.model.policy import Policy, load_policy
from align.model.precision import hold_frozen
from align.model.reference import check_reference_identity
from align.model.sharding import is_sharded, keep_stream_exact, read_sharding, sharding_asked
from align.objectives import ObjectiveConfig
from align.objectives.checks import check_domain, check_score_fits
from align.objectives.noise import resolution
from align.objectives.token_reg import Column
from align.packing.batch import collate
from align.recipe import Recipe
from align.runs.digests import check_written
from align.runs.run_directory import RunDirectory
from align.types import ListBatch, TokenStats
from rewards.head_config import Attributes, BradleyTerry


def loss_of(recipe: Recipe) -> ListLoss | RewardLoss:
    """The loss of a list under the recipe."""
    if recipe.task == "reward":
        return build_reward_loss(
            recipe.reward, recipe.objective, sources=len(recipe.data.sources), relative=computed_to(recipe)
        )
    return policy_loss(recipe)


def policy_loss(recipe: Recipe) -> ListLoss:
    """The loss of a list under the recipe of a policy."""
    relative = computed_to(recipe)
    if recipe.task == "sft":
        return likelihood_loss(relative, recipe.z_penalty)
    return build_loss(
        recipe.score,
        list_objectives(recipe),
        wpo=recipe.wpo,
        dpop=recipe.dpop,
        z_penalty=recipe.z_penalty,
        regularizer=recipe.regularizer,
        token_weights=recipe.token_weights,
        relative=relative,
    )


def computed_to(recipe: Recipe) -> float:
    """How far what the recipe's model computes may be off by rounding; see `align.objectives.noise`."""
    return resolution(getattr(torch, recipe.policy.dtype), getattr(torch, recipe.train.precision))


def prepare(recipe: Recipe, *, every_check: bool = False, tokenizer: PreTrainedTokenizerBase | None = None) -> Prepared:
    """The recipe's rows as token ids, and their audit.

    Args:
        every_check: the costly checks look at them too.
        tokenizer: by default that of the recipe's model.
    """
    contrast: Templates | None = None
    if recipe.needs_token_rewards and isinstance(recipe.token_rewards, ContrastSection):
        contrast = {"better": recipe.token_rewards.better, "worse": recipe.token_rewards.worse}
    wanted = Wanted(
        min_completions=min_completions(recipe),
        imitate=recipe.task == "sft",
        as_scored=recipe.task == "reward",
        seed=recipe.train.seed,
        contrast=contrast,
        token_weights=isinstance(recipe.token_weights, Column),
        needs_label=needs_label(recipe),
        margins=reads_margins(recipe),
        every_check=every_check,
    )
    template = read_chat_template(recipe.policy.chat_template)
    tokenizer = tokenizer or tokenizer_of(recipe.policy)
    prepared = prepare_data(recipe.data, tokenizer, chat_template=template, wanted=wanted)
    _check_margins(recipe, prepared)
    return prepared


def reads_margins(recipe: Recipe) -> bool:
    """Whether the rows' `margin` means something to an objective that is a function of lists."""
    return any(term.takes_margins for term in list_objectives(recipe))


def _check_margins(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse margins that none of the objectives of lists has a place for.

    `task: sft` and a regression on ratings take no side in a preference, so that the audit counts the column as not
    read; `bradley_terry` reads it by a name of its own, or not, as it says.
    """
    objectives = list_objectives(recipe)
    if reads_margins(recipe):
        prepared.audit.mark_read([MARGIN])
    elif objectives and not any(isinstance(term, BradleyTerry) for term in recipe.objective):
        every = chain(prepared.train_rows, prepared.heldout_rows) if prepared.audit.margins else ()
        row = next((row for row in every if row.margin), None)
        if row is not None:
            names = ", ".join(term.name for term in objectives)
            raise UserError(
                f"{row.place}, field {MARGIN}: {names} has no place for how far apart two completions should score; "
                f"take an objective of pairs or lists such as `logistic`, or {how_to_ignore(MARGIN)}"
            )


def tokenizer_of(policy: PolicySection) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that is trained."""
    code = {"trust_remote_code": policy.trust_remote_code}
    return load_tokenizer(policy.model, revision=policy.revision, chat_template=policy.chat_template, **code)


def min_completions(recipe: Recipe) -> int:
    """Completions that a row must have to be of use: two to prefer one, one for what looks at single completions."""
    if recipe.task == "reward":
        return 2 if ranks(recipe.objective) else 1
    return max((term.holds.min_list_size for term in list_objectives(recipe)), default=1)


def needs_label(recipe: Recipe) -> bool:
    """Whether a lone completion has to be called good or bad: an objective looks at it that does not just imitate."""
    return recipe.task == "preference" and any(term.name != "sft" for term in recipe.objective)


def list_objectives(recipe: Recipe) -> list[ObjectiveConfig]:
    """The objectives that are functions of a list's scores or rewards and its grades alone."""
    return [term for term in recipe.objective if not isinstance(term, BradleyTerry | Attributes)]


def check_objectives(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse, before training, grades and list sizes that an objective is not defined for.

    Raises:
        UserError: names the row.
    """
    objectives = list_objectives(recipe)
    if recipe.task != "reward":
        for objective in objectives:
            check_score_fits(objective.name, objective.holds, objective.score or recipe.score)
    for part in (prepared.train, prepared.heldout):
        for window in windows(part, "source", "row", "grades"):
            if not _within_domains(objectives, window["grades"].to_pylist()):
                _check_domains(objectives, window)


def _within_domains(objectives: list[ObjectiveConfig], grades: list[list[float]]) -> bool:
    """Whether all of a window's lists are, looked at together."""
    width = max(map(len, grades))
    padded = torch.tensor([own + [math.nan] * (width - len(own)) for own in grades], dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor([*map(len, grades)])[:, None]
    try:
        for objective in objectives:
            check_domain(objective.name, objective.holds, padded, mask)
    except UserError:
        return False
    return True


def _check_domains(objectives: list[ObjectiveConfig], window: Any) -> None:
    """Refuse the first list that is outside, by its row."""
    for source, row, grades in in_rows(window):
        one_list = torch.tensor([grades], dtype=torch.float64)
        for objective in objectives:
            try:
                check_domain(objective.name, objective.holds, one_list, torch.ones_like(one_list, dtype=torch.bool))
            except UserError as error:
                raise UserError(f"{source}, row {row}: {error}") from None


def check_positions(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse rows longer than a model's table of positions; count in the audit those that a rotary model may not know.

    Raises:
        UserError: names the row, or the key that makes samples too long.
    """
    policy, classifier = recipe.policy, recipe.task == "reward"
    table, made_for = positions(policy.model, policy.revision, policy.trust_remote_code, classifier=classifier)
    for part in (prepared.train, prepared.heldout):
        tokens, row_of = _lengths(part)
        if table is not None and (tokens > table).any():
            row = int(row_of[(tokens > table).argmax()])
            raise UserError(
                f"{part[row]['source']}, row {part[row]['row']}: {tokens[row_of == row].max()} tokens, and "
                f"data.max_length {recipe.data.max_length} is beyond the {table} positions of the model; set it to "
                f"{table} or less"
            )
        if table is None and made_for is not None:
            prepared.audit.positions = made_for
            prepared.audit.beyond_positions += int((tokens > made_for).sum())
    sampled = [] if classifier else prepared.heldout.select(range(min(recipe.sampling.prompts, len(prepared.heldout))))
    longest = max((len(row["prompt_ids"]) for row in sampled), default=0)
    if table is not None and longest and longest + recipe.sampling.max_tokens > table:
        raise UserError(
            f"sampling.max_tokens: {recipe.sampling.max_tokens} behind a prompt of {longest} tokens is beyond the "
            f"{table} positions of the model; give at most {max(table - longest, 0)}, or `sampling.prompts: 0`"
        )


def _lengths(part: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of every completion with its prompt, or the longest context of token rewards; and its list's place."""
    names = [n for n in ("better_ids", "worse_ids") if n in part.column_names]
    found, row_of, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for window in windows(part, "prompt_ids", "completion_ids", *names):
        before = lengths(window["prompt_ids"])
        for name in names:
            list_of = np.repeat(np.arange(len(before)), lengths(window[name]))
            np.maximum.at(before, list_of, lengths(pc.list_flatten(window[name])))
        sizes = lengths(window["completion_ids"])
        found.append(np.repeat(before, sizes) + lengths(pc.list_flatten(window["completion_ids"])))
        row_of.append(np.repeat(np.arange(start, start + len(before)), sizes))
        start += len(before)
    return np.concatenate(found), np.concatenate(row_of)


def build_policy(
    recipe: Recipe, prepared: Prepared, *, total_steps: int, device: torch.device, keep_reference: bool
) -> Policy:
    """The recipe's policy at its start, which is checked to be its reference."""
    options = load_options(recipe, prepared, total_steps=total_steps, device=device)
    for folder in (recipe.policy.model, recipe.policy.start_adapter):
        check_written(folder)
    start = recipe.policy.start_run if recipe.policy.adapter.reads_rows() else None
    if start and recipe.policy.adapter.moves_start():
        raise UserError("policy.start_run: lora_sb with a `step` is measured from its own start; leave `step` out")
    options = replace(options, like=RunDirectory(start).final_state() if start else None)
    policy = _load(recipe, options, keep_reference=keep_reference)
    check_token_ids(policy.model, policy.tokenizer, [prepared.train, prepared.heldout])
    check_reference_identity(policy, policy.collate([prepared.train[0]]))
    if recipe.train.precision == "bfloat16":
        keep_stream_exact(policy.model) if is_sharded(policy.scorer()) else hold_frozen(policy.model, torch.bfloat16)
    return policy


def _load(recipe: Recipe, options: LoadOptions, *, keep_reference: bool) -> Policy:
    """Whole, or cut over the processes where accelerate's configuration says so and the model can be read by parts."""
    if sharding_asked() and not (isinstance(recipe.policy.adapter, Full) and keep_reference):
        cut = load_by_part(recipe.policy, options, read_sharding(recipe.train.precision))
        if cut is not None:
            return cut
    return load_policy(recipe.policy, options, keep_reference=keep_reference)


def _loss_at_first(recipe: Recipe) -> Callable[[TokenStats, ListBatch], Tensor]:
    """The loss of a list where the policy is its own reference, by the objectives alone: token rewards and divergences
    are computed later."""
    plain = recipe.model_copy(update={"regularizer": None, "token_weights": None})
    loss = policy_loss(plain)
    return lambda stats, batch: loss(stats, stats.logprobs.detach(), batch)


def load_options(recipe: Recipe, prepared: Prepared, *, total_steps: int, device: torch.device) -> LoadOptions:
    """What a recipe's policy or reward model is loaded with."""
    init_batches = None
    if recipe.policy.adapter.reads_rows():
        pad_id = tokenizer_of(recipe.policy).pad_token_id
        examples = list(prepared.train.select(range(min(256, len(prepared.train)))))
        batches = micro_batches(examples, tokens_per_batch=recipe.train.batch_tokens)
        init_batches = [collate(batch, pad_id=pad_id) for batch in batches]
    return LoadOptions(
        dropout=recipe.train.dropout,
        seed=recipe.train.seed,
        device=device,
        total_steps=total_steps,
        init_batches=init_batches,
        init_loss=_loss_at_first(recipe) if init_batches is not None and recipe.task != "reward" else None,
        packing=recipe.train.packing,
    )
