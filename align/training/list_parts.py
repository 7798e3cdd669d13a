"""A list larger than a forward pass may be: its loss over all of it, its backward pass by parts."""

from dataclasses import fields, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from align.data.steps import part_of_list
from align.evaluate.lists import reference_logprobs
from align.packing.batch import Example
from align.types import ListBatch, TokenStats

Stats = TokenStats | Tensor
"""What a model says: a policy of every token, a reward model its rewards [N, A]."""
TRAINED = ("logprob", "logsumexp")
"""Of the head's outputs, those that have a gradient."""


class ListParts:
    """Runs a trainer's micro-batch in several passes."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def run(
        self, model: nn.Module, examples: list[Example], parts: list[list[int]], penalty: Tensor | float, *, last: bool
    ) -> Tensor:
        """A list larger than a forward pass may be: its loss is taken over all of it, its backward pass by parts.

        A first pass without activations gives every token's log-probability (a reward model's rewards) and so the loss
        and its gradient there; a second one carries that gradient through the model, one part at a time. Of a batch
        that another process's list has made several passes, the first part is all and the rest are empty.
        """
        trainer = self.trainer
        whole = trainer.policy.collate(examples or [trainer.idle])
        batches = [self._part(examples, places) for places in parts]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            found = [model(batch, trainer.outputs) for batch in batches]
        stats = _joined(whole, parts, found)
        if trainer.loss.needs_reference:  # in the same parts: before the first step it is the policy bit for bit
            whole = replace(whole, reference_logprobs=self._reference_in_parts(whole, parts, batches))
        leaves = [own.requires_grad_() for own in _trained_on(stats)]
        loss = trainer.loss_of(whole, stats, examples)
        gradients = torch.autograd.grad(loss, leaves)
        outputs = tuple(name for name in TRAINED if name in trainer.outputs)
        for number, (batch, places) in enumerate(zip(batches, parts, strict=True), start=1):
            with trainer.together(model, last and number == len(batches)):
                with trainer.compute_loss_context_manager():
                    every = _trained_on(model(batch, outputs))
                carried = [
                    (own * (whole[places, : own.shape[1]] if places else torch.zeros_like(own))).sum()
                    for own, whole in zip(every, gradients, strict=True)
                ]
                trainer.backward(sum(carried) + penalty)
            penalty = 0.0
        return loss.detach()

    def _part(self, examples: list[Example], places: list[int]) -> ListBatch:
        """Some completions of a list, all of a batch of several, or the least that goes through the model."""
        trainer = self.trainer
        if not places or not examples:
            return trainer.policy.collate([part_of_list(trainer.idle, [0])])
        return trainer.policy.collate(examples if len(examples) > 1 else [part_of_list(examples[0], places)])

    def _reference_in_parts(self, whole: ListBatch, parts: list[list[int]], batches: list[ListBatch]) -> Tensor:
        trainer = self.trainer
        with trainer.compute_loss_context_manager():
            found = [reference_logprobs(trainer.scorer, trainer.policy, batch) for batch in batches]
        return _join(whole, parts, found, whole.targets.shape[1])


def _trained_on(stats: Stats) -> list[Tensor]:
    """What the loss is differentiated by: token log-probabilities and log Z, or a reward model's rewards."""
    if isinstance(stats, Tensor):
        return [stats]
    return [stats.logprobs] if stats.logsumexp is None else [stats.logprobs, stats.logsumexp]


def _joined(whole: ListBatch, parts: list[list[int]], found: list[Stats]) -> Stats:
    """The statistics of a list's completions, from those of its parts."""
    if isinstance(found[0], Tensor):
        return _join(whole, parts, found, found[0].shape[1])  # type: ignore[arg-type]
    width = whole.targets.shape[1]
    names = [f.name for f in fields(TokenStats) if getattr(found[0], f.name) is not None]
    every: Any = {name: _join(whole, parts, [getattr(s, name) for s in found], width) for name in names}
    return TokenStats(**every)


def _join(whole: ListBatch, parts: list[list[int]], values: list[Tensor], width: int) -> Tensor:
    joined = torch.zeros(len(whole.targets), width, device=whole.targets.device)
    for places, own in filter(itemgetter(0), zip(parts, values, strict=True)):
        joined[places, : own.shape[1]] = own
    return joined
