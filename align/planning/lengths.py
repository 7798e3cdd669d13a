"""The passes that a run will make, from its rows' lengths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from align.data.steps import (
    Cost,
    balanced_shares,
    list_parts,
    micro_batches,
    packed_size,
    part_of_list,
    plan_steps,
    width,
)
from align.data.windows import lengths, windows
from align.packing.batch import Example
from align.recipe import Recipe

LOOKED_AT = 2000
"""Optimizer steps that are cut into passes to find the largest; of a longer run every so many-th, and the figure says
so."""

APART = 2**32
"""Between the beginnings of ranges that stand for prompts, which are none so long."""


@dataclass(frozen=True)
class Passes:
    """What the planned steps compute."""

    steps: int
    looked_at: int
    """Steps that were cut into passes."""
    largest: list[Example]
    """Lists of the pass with the most tokens."""
    per_step: int
    """Passes of a step, at most, on a process."""
    tokens: int
    """Cells that the layers read in the whole run, as the model reads them."""
    pairs: int
    """Pairs of a token and one that it attends to, in the whole run."""
    completions: int
    """Completion tokens of the run, which the head reads."""


def of_run(recipe: Recipe, lists: Dataset, *, processes: int) -> Passes:
    """The passes of the recipe's run over tokenised lists, on so many processes."""
    train = recipe.train
    options: dict[str, Any] = {"lists_per_step": train.lists_per_step, "epochs": train.epochs, "steps": train.steps}
    plan = plan_steps(lists["weight"][:], **options, seed=train.seed)
    sized = _Sized(lists)
    every = max(1, len(plan) // LOOKED_AT)
    best: tuple[int, list[Example]] = (-1, [])
    per_step, cost = 0, Cost(packed=train.packing)
    for rows in plan[::every]:
        for share in _shares([sized[row] for row in rows], processes, cost):
            passes = list(_cut(share, recipe))
            per_step = max(per_step, len(passes))
            best = max([best, *((cells(one, packed=train.packing), one) for one in passes)], key=lambda found: found[0])
    tokens = pairs = completions = 0
    for row in chain.from_iterable(plan):
        one = sized[row]
        tokens += cells([one], packed=train.packing)
        pairs += _pairs(one, packed=train.packing)
        completions += sum(map(len, one["completion_ids"]))
    return Passes(
        steps=len(plan),
        looked_at=len(plan[::every]),
        largest=[_filled(one, number) for number, one in enumerate(best[1])],
        per_step=per_step,
        tokens=tokens,
        pairs=pairs,
        completions=completions,
    )


class _Sized:
    """Lists by their lengths alone: a range stands for as many tokens, with none in common with another list's prompt.
    Of tokens a window at most is in memory.
    """

    def __init__(self, lists: Dataset) -> None:
        prompts, counts, sizes = ([np.zeros(0, np.int64)] for _ in range(3))
        for window in windows(lists, "prompt_ids", "completion_ids"):
            completions = window["completion_ids"]
            prompts.append(lengths(window["prompt_ids"]))
            counts.append(lengths(completions))
            sizes.append(lengths(pc.list_flatten(completions)))
        self.prompts, self.sizes = np.concatenate(prompts), np.concatenate(sizes)
        self.ends = np.cumsum(np.concatenate([[0], *counts]))

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> Example:
        completions = [range(size) for size in self.sizes[self.ends[row] : self.ends[row + 1]].tolist()]
        return {
            "prompt_ids": range(row * APART, row * APART + int(self.prompts[row])),
            "completion_ids": completions,
            "grades": [0.0] * len(completions),
        }


def cells_of(lists: Dataset, *, packed: bool) -> int:
    """Tokens that the layers read of all lists, each read by itself."""
    sized = _Sized(lists)
    return sum(cells([sized[row]], packed=packed) for row in range(len(sized)))


def _shares(lists: list[Example], processes: int, cost: Cost) -> list[list[Example]]:
    return [lists] if processes == 1 else balanced_shares(lists, processes, cost.of)


def _cut(lists: list[Example], recipe: Recipe) -> Iterator[list[Example]]:
    """A process's passes of a step; a list that is larger than one is cut."""
    limit = recipe.train.batch_tokens
    for batch in micro_batches(lists, tokens_per_batch=limit, packed=recipe.train.packing):
        if len(batch) == 1:
            yield from ([part_of_list(batch[0], places)] for places in list_parts(batch[0], limit))
        else:
            yield batch


def cells(lists: Sequence[Example], *, packed: bool) -> int:
    """Tokens that the layers read of a pass, padding included."""
    if packed:
        return sum(map(packed_size, lists))
    return sum(len(one["completion_ids"]) for one in lists) * max(map(width, lists), default=0)


def _pairs(example: Example, *, packed: bool) -> int:
    """Pairs of a query and a key that it sees."""
    prompt, sizes = len(example["prompt_ids"]), [len(ids) for ids in example["completion_ids"]]
    own = sum(size * (size + 1) // 2 + size * prompt for size in sizes)
    return own + (1 if packed else len(sizes)) * prompt * (prompt + 1) // 2


def _filled(example: Example, number: int) -> Example:
    """With tokens that no two sequences of a pass begin with alike, beside a list's prompt; nothing looks them up."""
    return example | {
        "prompt_ids": [number] * len(example["prompt_ids"]),
        "completion_ids": [[place] * len(ids) for place, ids in enumerate(example["completion_ids"])],
    }


def written(prompts: Sequence[Sequence[int]], *, completions: int, tokens: int) -> Dataset:
    """Lists of as many completions of the largest length as an online run samples of each prompt.

    Args:
        prompts: token ids.
    """
    one = [[place] * tokens for place in range(completions)]  # no two begin alike
    columns = {"prompt_ids": list(prompts), "completion_ids": [one] * len(prompts), "weight": [1.0] * len(prompts)}
    return Dataset.from_dict(columns)
