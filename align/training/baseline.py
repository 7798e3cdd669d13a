"""KTO's baseline of an optimizer step: how far the policy has moved on completions that are not a prompt's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.evaluate.lists import reference_logprobs
from align.packing.batch import Example

MISMATCHED = ("completion_ids", "learn_at", "token_weights")
"""What a completion takes along behind another prompt."""


class Baseline:
    """Takes it of the step that a trainer is at."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def of_step(self) -> Tensor:
        """KTO's estimate of the policy's divergence from the reference, in nats, at least 0.

        The mean log-ratio of every prompt of the whole step with the completion of the next row that is another: it
        does not depend on how the step is cut (TRL takes it per micro-batch), and weight 2 is the row twice.
        """
        trainer = self.trainer
        rows = trainer.plan[trainer.state.global_step]
        places = range(trainer.args.process_index, len(rows), trainer.args.world_size)
        total = torch.zeros((), device=trainer.args.device)
        for examples in trainer.micro_batches([self._mismatched(rows, place) for place in places]):
            total += self._log_ratio(examples or [self._mismatched(rows, 0)]) * bool(examples)
        return (trainer.accelerator.reduce(total, reduction="sum") / trainer.counted(rows)).clamp(min=0)

    def _mismatched(self, rows: Sequence[int], place: int) -> Example:
        trainer = self.trainer
        own, others = trainer.lists[rows[place]], [*rows[place + 1 :], *rows[:place]]
        other = next((one for one in map(trainer.lists.__getitem__, others) if not _is_same(one, own)), own)
        first = {name: other[name][:1] for name in MISMATCHED if name in other}
        counted = {} if trainer.weights is None else {"loss_weight": trainer.weights[rows[place]]}
        return {"prompt_ids": own["prompt_ids"], "grades": [0.0]} | first | counted

    @torch.no_grad()
    def _log_ratio(self, examples: list[Example]) -> Tensor:
        """Sum over the examples of the log-ratio of policy and reference, as often as each counts."""
        trainer = self.trainer
        batch = trainer.policy.collate(examples)
        with trainer.compute_loss_context_manager():
            ratio = trainer.scorer(batch).logprobs - reference_logprobs(trainer.scorer, trainer.policy, batch)
        weights = trainer.loss.message_weights(batch)
        ratio = ratio if weights is None else ratio * weights
        ratio = ratio.where(batch.completion_mask, 0.0)
        return ratio.sum() if batch.weights is None else (ratio.sum(dim=1) * batch.weights).sum().to(ratio.dtype)


def _is_same(a: Example, b: Example) -> bool:
    """Whether two rows have the same prompt and first completion, as a row that a step has twice."""
    return a["prompt_ids"] == b["prompt_ids"] and a["completion_ids"][:1] == b["completion_ids"][:1]
