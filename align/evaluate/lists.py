"""A policy measured on held-out lists."""

import torch
from accelerate import Accelerator
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from align.data.collate import draw_key
from align.data.steps import agreed_micro_batches
from align.loss import ListLoss
from align.metrics import Sums
from align.model.forward import TokenScorer, evaluating
from align.model.policy import Policy
from align.progress import progress
from align.types import ListBatch

OUTPUTS = ("logprob", "entropy")


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

    Args:
        scorer: the policy's model, in any mode; its mode is restored.
        lists: the same on every process, which takes its share.
        by_list: by the name of a figure of lists, filled with its value for each that this process took, by its place
            in `lists`; NaN where a list does not define it. A name that nothing measures stays empty.
        label: beside the progress bar.
    """
    sums = Sums()
    places = range(accelerator.process_index, len(lists), accelerator.num_processes)
    own = [lists[i] | {"place": i, "key": draw_key(0, str(lists[i]["id"]), i)} for i in places]
    batches = agreed_micro_batches(
        own, tokens_per_batch=tokens_per_batch, accelerator=accelerator, packed=policy.packing
    )
    shown = progress(label, len(own), unit="lists", show=accelerator.is_main_process)
    with evaluating(scorer), shown as advance:
        for examples in batches:
            batch = policy.collate(examples or [lists[0] | {"key": 0}])
            with accelerator.autocast():
                stats = scorer(batch, tuple(dict.fromkeys([*OUTPUTS, *loss.outputs])))
                reference = reference_logprobs(scorer, policy, batch) if policy.has_reference else None
            scores = loss.scores(stats, reference, batch)
            losses = loss(stats, reference, batch)
            values = {"loss": losses, **loss.metrics(batch, stats, reference, scores)}
            sums.add(values, counts=bool(examples))
            advance(len(examples))
            for name, found in (by_list or {}).items():
                if name in values:
                    found.update(zip([e["place"] for e in examples], values[name].tolist(), strict=False))
    return sums.means(accelerator)


def reference_logprobs(scorer: TokenScorer, policy: Policy, batch: ListBatch) -> Float[Tensor, "N C"]:
    """The reference's log-probability of every target: cached in the batch, or computed here."""
    if batch.reference_logprobs is not None:
        return batch.reference_logprobs
    with policy.reference():
        return scorer(batch).logprobs
