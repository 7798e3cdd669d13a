"""Holds functions of a user's own to what every objective and score promises, on a few numbers before training.

What is asked here is what the trainer relies on: a batch may be cut and padded anyhow, and gives the same losses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from align.errors import UserError
from align.objectives.base import Properties
from align.tensors import Bool, Float, Tensor, torch

FILLS = (float("nan"), 9.0, -9.0)
"""What padding holds; NaN alone compares false with everything, and so hides a mask that is missing."""


def keywords(function: Callable[..., Any]) -> frozenset[str]:
    """Names of what a function takes."""
    return frozenset(inspect.signature(function).parameters)


def check_objective(function: Callable[..., Any], place: str, holds: Properties, options: dict[str, Any]) -> None:
    """A function of lists against the contract of an objective.

    Args:
        function: (scores [B, K], grades [B, K], list_mask [B, K], **options) -> losses [B]; it may take `beta`,
            `baseline`, `keys`, `margins` and `noise`, as built-in ones do.
        place: names it in messages.
        holds: the sizes of lists that it takes.
        options: its keywords.

    Raises:
        UserError: it fails, or says what it breaks: one finite loss per list, of that list alone, whatever padding
            holds and however the completions are ordered, with a finite gradient.

    Source: ours.
    """
    low, width = holds.min_list_size, holds.max_list_size or holds.min_list_size + 2
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(low, width + 1).repeat(2)
    mask = torch.arange(width + 1 if holds.max_list_size is None else width) < sizes[:, None]
    scores = -3 * torch.rand(mask.shape, generator=generator) - 0.1
    grades = torch.randint(0, 5, mask.shape, generator=generator) / 4.0

    def call(scores: Tensor, grades: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
        given = {"beta": 0.1, "baseline": 0.0, "keys": keys, "noise": torch.full_like(scores, 1e-6)}
        given["margins"] = torch.full_like(scores[:, 0], 0.25)
        given = {name: value for name, value in given.items() if name in keywords(function) and name not in options}
        return function(scores, grades, mask, **given, **options)

    check = _Check(place, "one loss per list", "lists", call)
    keys = torch.arange(mask.numel()).view(mask.shape)
    losses = check.padding((scores, grades), mask, keys)
    order = torch.randperm(mask.shape[1], generator=generator)
    check.same(losses, [t[:, order] for t in (scores, grades, mask, keys)], "the order of a list's completions")
    for row, size in enumerate(sizes.tolist()):
        alone = [t[row : row + 1, :size] for t in (scores, grades, mask, keys)]
        check.same(losses[row : row + 1], alone, "which other lists are in the batch")


def check_score_function(function: Callable[..., Any], place: str, options: dict[str, Any]) -> None:
    """A function of completions against the contract of a score.

    Args:
        function: (policy_logprobs [N, C], reference_logprobs [N, C], completion_mask [N, C], list_index [N],
            **options) -> scores [N].
        place: names it in messages.
        options: its keywords.

    Raises:
        UserError: it fails, or says what it breaks: one finite score per completion, whatever padding holds and however
            the completions are ordered, with a finite gradient.

    Source: ours.
    """
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([5, 2, 3, 1, 4])[:, None]
    policy, other = -3 * torch.rand(2, *mask.shape, generator=generator) - 0.1
    lists = torch.tensor([0, 0, 1, 1, 1])

    def call(policy: Tensor, other: Tensor, mask: Tensor, lists: Tensor) -> Tensor:
        return function(policy, other, mask, lists, **options)

    check = _Check(place, "one score per completion", "completions", call)
    scores = check.padding((policy, other), mask, lists)
    order = torch.randperm(len(mask), generator=generator)
    check.same(scores[order], [t[order] for t in (policy, other, mask, lists)], "the order of the completions")


class _Check:
    """Calls a function and says what it does that it may not do."""

    def __init__(self, place: str, gives: str, rows: str, call: Callable[..., Any]) -> None:
        self.place, self.gives, self.rows, self._call = place, gives, rows, call

    def fault(self, what: str) -> UserError:
        return UserError(f"{self.place}: {what}")

    def values(self, *arguments: Tensor) -> Float[Tensor, " B"]:
        """What the function gives, which has the right shape and is finite; its draws leave torch's generator alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                found = self._call(*arguments)
            except Exception as error:
                raise self.fault(
                    f"fails on {len(arguments[0])} {self.rows} made up to try it: {type(error).__name__}: {error}"
                ) from error
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            raise self.fault(f"gives {type(found).__name__}, not a tensor of floats: {self.gives}")
        if found.shape != (len(arguments[0]),):
            raise self.fault(
                f"gives a tensor of shape {list(found.shape)} for {len(arguments[0])} {self.rows}, not {self.gives}"
            )
        if not found.isfinite().all():
            raise self.fault("gives a number that is not finite; padding, which may hold NaN, must not reach it")
        return found

    def padding(self, inputs: tuple[Tensor, Tensor], mask: Bool[Tensor, "B K"], last: Tensor) -> Float[Tensor, " B"]:
        """The values, for which and for whose gradient it must not matter what padding holds."""
        values: list[Tensor] = []
        for fill in FILLS:
            first, second = (t.masked_fill(~mask, fill) for t in inputs)
            first.requires_grad_()
            values.append(self.values(first, second, mask, last))
            if not values[-1].requires_grad:
                raise self.fault("gives numbers without a gradient, from which nothing can be learnt")
            (gradient,) = torch.autograd.grad(values[-1].sum(), first, allow_unused=True)
            if gradient is None or not gradient[mask].isfinite().all() or not gradient.isfinite().all():
                raise self.fault("has a gradient that is not finite; set padding to 0 before anything is done with it")
            if (gradient[~mask] != 0).any():
                raise self.fault("has a gradient where there is only padding; mask it")
        if not all(torch.allclose(own, values[0], rtol=1e-4, atol=1e-5) for own in values):
            raise self.fault("depends on what padding holds; mask it")
        return values[0].detach()

    def same(self, expected: Tensor, inputs: Sequence[Tensor], what: str) -> None:
        """Nothing but `expected` must come of other inputs."""
        if not torch.allclose(self.values(*inputs).detach(), expected, rtol=1e-4, atol=1e-5):
            raise self.fault(f"depends on {what}; it must not")
