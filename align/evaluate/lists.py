"""A policy measured on held-out lists."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from align.data.steps import agreed_micro_batches
from align.data.windows import lengths, windows
from align.losses.list_loss import ListLoss
from align.losses.metrics import Sums
from align.model.forward import TokenScorer, evaluating
from align.model.policy import Policy
from align.packing.batch import Example, draw_key
from align.progress import progress
from align.types import ListBatch, TokenStats

OUTPUTS = ("logprob", "entropy", "hidden_diversity")
PER_COMPLETION = (
    *("targets", "predict_at", "list_index", "slot", "ends_at", "attributes"),
    *("reference_logprobs", "token_rewards", "token_weights"),
)
"""Fields of a batch with an entry for each completion."""


@torch.no_grad()
def evaluate_lists(
    scorer: TokenScorer,
    policy: Policy,
    loss: ListLoss,
    lists: Dataset,
    *,
    tokens_per_batch: int,
    accelerator: Accelerator,
    by_list: dict[str, dict[int, float]] | None = None,
    label: str = "evaluating",
) -> dict[str, float]:
    """Mean loss and metrics over lists; the same figures for every `tokens_per_batch` and number of processes.

    The loss is that of the completions that training keeps of a list (column `trained`), so that it is the figure that
    training shows; what ranks is measured on whole lists.

    Args:
        scorer: the policy's model, in any mode; its mode is restored.
        lists: the same on every process, which takes its share.
        by_list: by the name of a figure of lists, filled with its value for each that this process took, by its place
            in `lists`; NaN where a list does not define it. A name that nothing measures stays empty.
        label: beside the progress bar.
    """
    sums = Sums()
    places = range(accelerator.process_index, len(lists), accelerator.num_processes)
    batches = agreed_micro_batches(
        _outlines(lists, places), tokens_per_batch=tokens_per_batch, accelerator=accelerator, packed=policy.packing
    )
    shown = progress(label, len(places), unit="lists", show=accelerator.is_main_process)
    with evaluating(scorer), shown as advance:
        for outlines in batches:
            examples = [_example(lists, own["place"]) for own in outlines]
            batch = policy.collate(examples or [lists[0] | {"key": 0}])
            with accelerator.autocast():
                stats = scorer(batch, tuple(dict.fromkeys([*OUTPUTS, *loss.outputs])))
                reference = reference_logprobs(scorer, policy, batch) if policy.has_reference else None
            scores = loss.scores(stats, reference, batch)
            losses = loss(*_as_trained(stats, reference, batch, examples or [lists[0]]))
            values = {"loss": losses, **loss.metrics(batch, stats, reference, scores)}
            sums.add(values, batch, counts=bool(examples))
            advance(len(examples))
            for name, found in (by_list or {}).items():
                if name in values:
                    found.update(zip([e["place"] for e in examples], values[name].tolist(), strict=False))
    return sums.means(accelerator)


def _example(lists: Dataset, place: int) -> Example:
    example = lists[place]
    return example | {"place": place, "key": draw_key(0, str(example["id"]), place)}


def _outlines(lists: Dataset, places: Sequence[int]) -> list[Example]:
    """Lists as far as batches are cut by them: ranges as long as their prompt and completions; no token is read."""
    found: list[Example] = []
    wanted, start = set(places), 0
    for window in windows(lists, "prompt_ids", "completion_ids"):
        prompts, sizes = lengths(window["prompt_ids"]).tolist(), lengths(window["completion_ids"])
        every = np.split(lengths(pc.list_flatten(window["completion_ids"])), np.cumsum(sizes)[:-1])
        for place, (prompt, own) in enumerate(zip(prompts, every, strict=True), start=start):
            if place in wanted:
                found.append(
                    {"place": place, "prompt_ids": range(prompt), "completion_ids": [*map(range, own.tolist())]}
                )
        start += len(prompts)
    return found


def _as_trained(
    stats: Any, reference: Tensor | None, batch: ListBatch, examples: Sequence[Example]
) -> tuple[Any, Tensor | None, ListBatch]:
    """Statistics and batch without the completions that training leaves out."""
    if "trained" not in examples[0]:
        return stats, reference, batch
    places = [torch.tensor(example["trained"]) for example in examples]
    sizes = torch.tensor([len(example["completion_ids"]) for example in examples])
    starts = (sizes.cumsum(0) - sizes).tolist()
    kept = torch.cat([start + own for start, own in zip(starts, places, strict=True)]).to(batch.targets.device)
    fields = vars(batch) | {
        name: value[kept] for name, value in vars(batch).items() if name in PER_COMPLETION and value is not None
    }
    fields["slot"] = torch.cat([torch.arange(len(own)) for own in places]).to(kept.device)
    width = max(map(len, places))
    index = torch.stack([torch.nn.functional.pad(own, (0, width - len(own))) for own in places]).to(kept.device)
    counts = torch.tensor([len(own) for own in places], device=kept.device)
    fields["list_mask"] = torch.arange(width, device=kept.device) < counts[:, None]
    fields["grades"] = batch.grades.gather(1, index).where(fields["list_mask"], 0.0)
    own_stats = stats[kept] if isinstance(stats, Tensor) else _of(stats, kept)
    return own_stats, None if reference is None else reference[kept], type(batch)(**fields)


def _of(stats: TokenStats, kept: Tensor) -> TokenStats:
    found: dict[str, Any] = {name: None if value is None else value[kept] for name, value in vars(stats).items()}
    return TokenStats(**found)


def reference_logprobs(scorer: TokenScorer, policy: Policy, batch: ListBatch) -> Float[Tensor, "N C"]:
    """The reference's log-probability of every target: cached in the batch, or computed here."""
    if batch.reference_logprobs is not None:
        return batch.reference_logprobs
    with policy.reference():
        return scorer(batch).logprobs
