"""The lists that an export is compared on, with what the trained policy makes of them before anything is written."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.data.boundary import special_tokens
from align.data.schema import Text, is_token_ids
from align.data.texts import read_chat_template
from align.data.tokenize import encode_prompt
from align.errors import UserError
from align.export.merging import load_float32, probe_ids, with_adapter
from align.export.trained import Trained, source_of
from align.losses.ranking import pair_accuracy
from align.model.adapters import Full
from align.model.load import LoadOptions
from align.model.policy import Policy, load_policy
from align.progress import progress, stage
from align.recipe import Recipe, with_consent
from align.runs.build import prepare, tokenizer_of
from align.runs.run_directory import RunDirectory

log = logging.getLogger("align")

CALIBRATED = 128
"""Training rows that a quantiser looks at; GPTQ's and AWQ's papers take 128 sequences."""
NONE_OF_A_RUN = "a probe text, as there is no run with held-out lists"


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt as a user would give it, and as the policy read it."""

    text: Text
    options: dict[str, Any]
    """What the chat template is given besides the messages."""
    token_ids: list[int]
    place: str


@dataclass(frozen=True)
class HeldOut:
    """Lists of K completions as token ids; the policy's log-probabilities of every completion token, in float32."""

    said: str
    """What the lists are, in words."""
    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    completion_ids: list[list[list[int]]]
    grades: list[list[float]]
    logprobs: list[list[Tensor]] = field(default_factory=list)
    """Per list and completion, one per token; nats."""
    reference: list[list[float]] | None = None
    """Sums of the reference's log-probabilities per completion; None where the policy's start is not at hand."""

    @property
    def tokens(self) -> int:
        """Completion tokens in all lists."""
        return sum(len(own) for every in self.completion_ids for own in every)

    @property
    def ranked_by(self) -> str:
        """What `pair_accuracy` ranks by."""
        return "likelihood" if self.reference is None else "implicit reward"

    def pair_accuracy(self, logprobs: Sequence[Sequence[Tensor]]) -> float | None:
        """Mean over lists of the share of ordered pairs that the log-probabilities rank as the grades do.

        Args:
            logprobs: as the field of that name. They rank by the implicit reward or, without a reference, by their mean
                per token.

        Returns:
            The share; None where no list has a pair.
        """
        found = []
        for number, (own, grades) in enumerate(zip(logprobs, self.grades, strict=True)):
            if self.reference is None:
                scores = torch.stack([one.double().mean() for one in own])
            else:
                scores = torch.stack([one.double().sum() for one in own]) - torch.tensor(self.reference[number])
            given = torch.tensor(grades, dtype=torch.float64)
            found.append(pair_accuracy(scores[None], given[None], torch.ones(1, len(grades), dtype=torch.bool)))
        shares = torch.cat(found)
        return shares.nanmean().item() if not shares.isnan().all() else None


def held_out(trained: Trained, tokenizer: PreTrainedTokenizerBase, *, lists: int) -> HeldOut:
    """What the trained policy gives, in float32, on up to so many held-out lists of its run, or on a probe text."""
    recipe = _recipe(trained)
    held = _of_run(recipe, lists) if recipe is not None and lists else None
    if held is None:
        held, recipe = _probe(tokenizer), None
    with stage("reading the trained policy"):
        model, reference = _policy(trained, recipe)
    logprobs = read_lists(held, lambda ids, start: token_logprobs(model, ids, start), "the trained policy")
    before = None
    if reference is not None and recipe is not None:
        with reference:
            own = read_lists(held, lambda ids, start: token_logprobs(model, ids, start), "its reference")
        before = [[one.double().sum().item() for one in every] for every in own]
    return HeldOut(held.said, held.prompts, held.prompt_ids, held.completion_ids, held.grades, logprobs, before)


def calibration(trained: Trained) -> tuple[tuple[int, ...], ...]:
    """Token ids of the run's first training lists: of each the prompt with its best completion.

    Raises:
        UserError: there is no run, or its rows cannot be read any more.
    """
    recipe = _recipe(trained)
    if recipe is None:
        raise UserError(
            f"{trained.folder}: a quantiser that looks at a model's inputs needs the rows of a run; give the run "
            "directory of one that was trained on lists"
        )
    rows = prepare(recipe).train
    best = (max(zip(row["grades"], row["completion_ids"], strict=True))[1] for row in rows.take(CALIBRATED))
    return tuple((*row["prompt_ids"], *own) for row, own in zip(rows.take(CALIBRATED), best, strict=True))


def read_lists(held: HeldOut, read: Any, who: str) -> list[list[Tensor]]:
    """The log-probabilities that `read(token ids, start)` gives of every completion's tokens."""
    found = []
    with progress(f"comparing {who}", len(held.prompt_ids), unit="lists") as advance:
        for prompt, completions in zip(held.prompt_ids, held.completion_ids, strict=True):
            found.append([read([*prompt, *own], len(prompt)) for own in completions])
            advance(1)
    return found


@torch.no_grad()
def token_logprobs(model: Any, ids: Sequence[int], start: int) -> Tensor:
    """A transformers model's log-probabilities of the tokens from place `start` on, which is 1 or more; nats."""
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, start - 1 : -1].float()
    targets = torch.tensor(ids[start:], device=logits.device)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu()


def _recipe(trained: Trained) -> Recipe | None:
    """The recipe of a run that was trained on lists."""
    if trained.run_folder is None:
        return None
    run = RunDirectory(trained.run_folder)
    try:
        recipe = run.read_recipe()
    except UserError as error:
        log.warning("the run's recipe cannot be read (%s), so that the export is compared on a probe text", error)
        return None
    if recipe.task == "reward" or recipe.online:
        return None
    return with_consent(recipe, run.recipe, trust_remote_code=trained.trust_remote_code, allow_code=None)


def _of_run(recipe: Recipe, lists: int) -> HeldOut | None:
    """The first held-out lists of a run, as they were in training; None where they cannot be read any more."""
    try:
        prepared = prepare(recipe)
    except UserError as error:
        log.warning("the run's rows cannot be read (%s), so that the export is compared on a probe text", error)
        return None
    part, rows, which = prepared.heldout, prepared.heldout_rows, "held-out"
    if not len(part):
        part, rows, which = prepared.train, prepared.train_rows, "training (none is held out)"
    chosen = part.select(range(min(lists, len(part))))
    tokenizer, template = tokenizer_of(recipe.policy), read_chat_template(recipe.policy.chat_template)
    suffix = list(special_tokens(tokenizer).suffix)
    prompts = []
    for row in (rows[place] for place in range(len(chosen))):
        if not is_token_ids(row.prompt):
            ids = encode_prompt(row, tokenizer, template) + (suffix if isinstance(row.prompt, str) else [])
            prompts.append(Prompt(row.prompt, row.template_arguments, ids, row.place))
    return HeldOut(
        f"{len(chosen)} {which} lists of the run",
        prompts,
        list(chosen["prompt_ids"]),
        list(chosen["completion_ids"]),
        list(chosen["grades"]),
    )


def _probe(tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    ids = probe_ids(tokenizer)[0].tolist()
    return HeldOut(NONE_OF_A_RUN, [], [ids[:1]], [[ids[1:]]], [[0.0]])


def _policy(trained: Trained, recipe: Recipe | None) -> tuple[Any, AbstractContextManager[None] | None]:
    """The trained model in float32 and, where it is at hand, a context in which it is the reference.

    Of a run it is what training left in its checkpoint; else what stands in the folder. An adapter on 4-bit weights is
    taken on the whole ones, which an export is for.
    """
    own = trained.run_folder is not None and trained.folder == trained.run_folder / "adapter"  # else a combination
    if recipe is not None and trained.run_folder is not None and own and recipe.policy.quantization is None:
        try:
            return _from_state(recipe, RunDirectory(trained.run_folder).final_state())
        except UserError as error:
            log.warning("the run's state cannot be read (%s), so that its adapter folder stands for it", error)
    model: PreTrainedModel | Any = load_float32(source_of(trained), trained)
    return (with_adapter(model, trained) if trained.base is not None else model), None


def _from_state(recipe: Recipe, state: Path) -> tuple[Any, AbstractContextManager[None] | None]:
    section = recipe.policy.model_copy(update={"dtype": "float32"})
    full = isinstance(section.adapter, Full) and section.start_adapter is None
    options = LoadOptions(seed=recipe.train.seed, total_steps=1, like=state, packing=False)
    policy: Policy = load_policy(section, options, keep_reference=False)
    policy.load_state(state)
    policy.model.eval()
    return policy.model, None if full else policy.reference()
