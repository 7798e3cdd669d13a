"""Which lists each optimizer step trains on, and how a step is cut into micro-batches."""

from collections import Counter
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from align.errors import UserError
from align.packing.batch import TOKEN_COLUMNS, draw_key

PER_COMPLETION = ("completion_ids", "grades", "attributes", "deviations", *TOKEN_COLUMNS)
"""Columns of a tokenised list with an entry for each completion."""


def plan_steps(weights: Sequence[float], *, lists_per_step: int, epochs: float, steps: int | None, seed: int) -> list:
    """The lists of every optimizer step of a run, a function of its arguments alone.

    An epoch takes a list of weight w floor(w) times, and once more with the chance of the remainder, in a new random
    order. A run of whole epochs ends with a smaller step where the lists do not divide.

    Returns:
        One list of row indices per step.

    Raises:
        UserError: weights so small that no list is taken.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = steps * lists_per_step if steps else None
    order: list[int] = []
    epoch = 0
    while len(order) < wanted if wanted else epoch < epochs:
        drawn = _one_epoch(torch.tensor(weights, dtype=torch.float64), generator)
        share = 1.0 if wanted else min(1.0, epochs - epoch)
        order += drawn[: max(1, round(share * len(drawn)))]
        epoch += 1
    order = order[:wanted] if wanted else order
    if not order:
        raise UserError(
            f"data.sources: with these weights no list is taken in {epochs:g} epochs; a set of weight 1 is seen once "
            "in an epoch, so give larger weights or set train.steps"
        )
    return [order[i : i + lists_per_step] for i in range(0, len(order), lists_per_step)]


def _one_epoch(weights: torch.Tensor, generator: torch.Generator) -> list[int]:
    copies = weights.floor() + (torch.rand(len(weights), generator=generator, dtype=torch.float64) < weights.frac())
    rows = torch.repeat_interleave(torch.arange(len(weights)), copies.long())
    return rows[torch.randperm(len(rows), generator=generator)].tolist()


class StepLists(Dataset[list[dict]]):
    """Item s is one process's share of step s's lists: about as many tokens as every other's."""

    def __init__(self, lists: Sequence[dict], plan: Sequence[Sequence[int]], *, rank: int, world_size: int) -> None:
        self.lists = lists
        self.plan = plan
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> list[dict]:
        lists = [self.lists[row] for row in self.plan[step]]
        before: Counter[str] = Counter()
        for place, example in enumerate(lists):
            identity = str(example.get("id"))
            lists[place] = example | {"key": draw_key(step + 1, identity, before[identity])}
            before[identity] += 1
        return lists if self.world_size == 1 else balanced_shares(lists, self.world_size)[self.rank]


def balanced_shares(lists: Sequence[dict], count: int) -> list[list[dict]]:
    """Lists dealt out by size, the largest first, each to the share that has the fewest tokens so far."""
    shares: list[list[dict]] = [[] for _ in range(count)]
    loads = [0] * count
    for example in sorted(lists, key=packed_size, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(example)
        loads[least] += packed_size(example)
    return shares


def width(example: dict) -> int:
    """Tokens of a list's longest row."""
    return len(example["prompt_ids"]) + max(len(ids) for ids in example["completion_ids"])


def packed_size(example: dict) -> int:
    """Tokens of a list's prompt, once, and of its completions."""
    return len(example["prompt_ids"]) + sum(map(len, example["completion_ids"]))


def micro_batches(examples: Sequence[dict], *, tokens_per_batch: int, packed: bool = False) -> list[list[dict]]:
    """Cut lists into batches of at most `tokens_per_batch` tokens, counted as the model reads them.

    Padded rows: padding included, lists of like length together. Packed: the largest list first, each into the first
    batch that has room for it. A list that is larger alone is a batch alone.
    """
    if packed:
        return _first_fit(examples, tokens_per_batch)
    batches: list[list[dict]] = []
    rows = 0
    for example in sorted(examples, key=width):
        rows += len(example["completion_ids"])
        if batches and rows * width(example) <= tokens_per_batch:
            batches[-1].append(example)
        else:
            batches.append([example])
            rows = len(example["completion_ids"])
    return batches


def _first_fit(examples: Sequence[dict], tokens_per_batch: int) -> list[list[dict]]:
    batches: list[list[dict]] = []
    room: list[int] = []
    for example in sorted(examples, key=packed_size, reverse=True):
        size = packed_size(example)
        place = next((b for b, left in enumerate(room) if size <= left), None)
        if place is None:
            batches.append([example])
            room.append(tokens_per_batch - size)
        else:
            batches[place].append(example)
            room[place] -= size
    return batches


def list_parts(example: dict, tokens_per_batch: int) -> list[list[int]]:
    """The completions of a list in parts that fit a forward pass together with the prompt; whole if it fits."""
    room = tokens_per_batch - len(example["prompt_ids"])
    sizes = list(map(len, example["completion_ids"]))
    if sum(sizes) <= room:
        return [list(range(len(sizes)))]
    parts: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        part = next((p for p in parts if sum(sizes[k] for k in p) + sizes[place] <= room), None)
        if part is None:
            parts.append([place])
        else:
            part.append(place)
    return parts


def part_of_list(example: dict, places: Sequence[int]) -> dict:
    """A list of some of another's completions."""
    return {name: [value[k] for k in places] if name in PER_COMPLETION else value for name, value in example.items()}


def agreed_micro_batches(
    examples: Sequence[dict], *, tokens_per_batch: int, accelerator: Accelerator, packed: bool = False
) -> list[list[dict]]:
    """Micro-batches, as many on every process, since sharded models communicate in each forward pass.

    A process with too few lists gets empty ones at the end.
    """
    batches = micro_batches(examples, tokens_per_batch=tokens_per_batch, packed=packed)
    if accelerator.num_processes == 1:
        return batches
    count = torch.tensor([len(batches)], device=accelerator.device)
    wanted = int(accelerator.gather(count).max())
    batches = cut_further(batches, wanted)
    return batches + [[] for _ in range(wanted - len(batches))]


def cut_further(batches: list[list[dict]], count: int) -> list[list[dict]]:
    """Halve the largest batches until there are `count`, or until every batch is one list."""
    batches = list(batches)
    while len(batches) < count and max(map(len, batches), default=0) > 1:
        largest = batches.pop(max(range(len(batches)), key=lambda b: len(batches[b])))
        batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return batches
