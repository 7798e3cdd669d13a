"""A recipe's sections become objects: token ids, losses and models."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.data import Prepared, Source, prepare_data, read_chat_template
from align.data.contrast import Templates
from align.data.steps import micro_batches
from align.errors import UserError
from align.losses.list_loss import ListLoss, build_loss, likelihood_loss
from align.losses.reward_loss import RewardLoss, build_reward_loss, ranks
from align.model.adapters import Eva
from align.model.checks import check_token_ids
from align.model.config import ContrastSection, PolicySection
from align.model.load import load_tokenizer, positions
from align.model.policy import Policy, load_policy
from align.model.precision import hold_frozen
from align.model.reference import check_reference_identity
from align.objectives import ObjectiveConfig
from align.objectives.checks import check_domain, check_score_fits
from align.objectives.noise import resolution
from align.objectives.token_reg import Column
from align.packing.batch import collate
from align.recipe import Recipe
from align.runs.run_directory import RunDirectory
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
        return likelihood_loss(relative)
    return build_loss(
        recipe.score,
        list_objectives(recipe),
        wpo=recipe.wpo,
        dpop=recipe.dpop,
        regularizer=recipe.regularizer,
        token_weights=recipe.token_weights,
        relative=relative,
    )


def computed_to(recipe: Recipe) -> float:
    """How far what the recipe's model computes may be off by rounding; see `align.objectives.noise`."""
    return resolution(getattr(torch, recipe.policy.dtype), getattr(torch, recipe.train.precision))


def prepare(recipe: Recipe) -> Prepared:
    """The recipe's rows as token ids, and their audit."""
    data, policy = recipe.data, recipe.policy
    fields = data.model_dump(exclude={"sources", "eval_sources", "select", "append_eos", "ches"})
    own_ends = None if recipe.task == "reward" else data.append_eos is not False
    contrast: Templates | None = None
    if recipe.needs_token_rewards and isinstance(recipe.token_rewards, ContrastSection):
        contrast = {"better": recipe.token_rewards.better, "worse": recipe.token_rewards.worse}
    return prepare_data(
        sources=[Source(**source.model_dump()) for source in data.sources],
        eval_sources=[Source(**source.model_dump()) for source in data.eval_sources],
        select="best" if recipe.task == "sft" else data.select,
        tokenizer=tokenizer_of(policy),
        chat_template=read_chat_template(policy.chat_template),
        min_completions=min_completions(recipe),
        append_eos=own_ends,
        seed=recipe.train.seed,
        contrast=contrast,
        token_weights=isinstance(recipe.token_weights, Column),
        needs_label=needs_label(recipe),
        **fields,
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
        for source, row, grades in zip(part["source"][:], part["row"][:], part["grades"][:], strict=True):
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
        lengths = _lengths(part)
        if table is not None and any(length > table for own in lengths for length in own):
            row = next(i for i, own in enumerate(lengths) if max(own) > table)
            raise UserError(
                f"{part[row]['source']}, row {part[row]['row']}: {max(lengths[row])} tokens, and data.max_length "
                f"{recipe.data.max_length} is beyond the {table} positions of the model; set it to {table} or less"
            )
        if table is None and made_for is not None:
            prepared.audit.positions = made_for
            prepared.audit.beyond_positions += sum(length > made_for for own in lengths for length in own)
    sampled = [] if classifier else prepared.heldout.select(range(min(recipe.sampling.prompts, len(prepared.heldout))))
    longest = max((len(row["prompt_ids"]) for row in sampled), default=0)
    if table is not None and longest and longest + recipe.sampling.max_tokens > table:
        raise UserError(
            f"sampling.max_tokens: {recipe.sampling.max_tokens} behind a prompt of {longest} tokens is beyond the "
            f"{table} positions of the model; give at most {max(table - longest, 0)}, or `sampling.prompts: 0`"
        )


def _lengths(part: Dataset) -> list[list[int]]:
    """Tokens of every completion with its prompt, and of the contexts that token rewards are computed under."""
    names = [n for n in ("better_ids", "worse_ids") if n in part.column_names]
    columns = zip(*(part[n][:] for n in ("prompt_ids", "completion_ids", *names)), strict=True)
    return [
        [max(map(len, [prompt, *(ids for c in contexts for ids in c)])) + len(ids) for ids in completions]
        for prompt, completions, *contexts in columns
    ]


def build_policy(
    recipe: Recipe, prepared: Prepared, *, total_steps: int, device: torch.device, keep_reference: bool
) -> Policy:
    """The recipe's policy at its start, which is checked to be its reference."""
    options = load_options(recipe, prepared, total_steps=total_steps, device=device)
    start = recipe.policy.start_run if isinstance(recipe.policy.adapter, Eva) else None
    options["like"] = RunDirectory(start).final_state() if start else None
    policy = load_policy(**options, keep_reference=keep_reference)
    check_token_ids(policy.model, policy.tokenizer, [prepared.train, prepared.heldout])
    check_reference_identity(policy, policy.collate([prepared.train[0]]))
    if recipe.train.precision == "bfloat16":
        hold_frozen(policy.model, torch.bfloat16)
    return policy


def load_options(recipe: Recipe, prepared: Prepared, *, total_steps: int, device: torch.device) -> dict[str, Any]:
    """What a policy and a reward model are both loaded with."""
    init_batches = None
    if isinstance(recipe.policy.adapter, Eva):
        pad_id = tokenizer_of(recipe.policy).pad_token_id
        examples = list(prepared.train.select(range(min(256, len(prepared.train)))))
        batches = micro_batches(examples, tokens_per_batch=recipe.train.batch_tokens)
        init_batches = [collate(batch, pad_id=pad_id) for batch in batches]
    return {
        **recipe.policy.keywords(),
        "dropout": recipe.train.dropout,
        "seed": recipe.train.seed,
        "device": device,
        "total_steps": total_steps,
        "init_batches": init_batches,
        "packing": recipe.train.packing,
    }
