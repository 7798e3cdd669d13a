"""Which lists each optimizer step trains on, and how a step is cut into micro-batches."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from operator import itemgetter

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from align.errors import UserError
from align.packing.batch import TOKEN_COLUMNS, draw_key
from align.packing.trie import agree

SHARED_PROMPT = 128
"""Tokens that prompts have to begin with alike for lists to be brought together; a chat template's few are not."""

PER_COMPLETION = ("completion_ids", "learn_at", "grades", "attributes", "deviations", *TOKEN_COLUMNS)
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


@dataclass(frozen=True)
class Cost:
    """What a list costs a process, in tokens: each that goes through the layers is 1, attention and the head are extra.

    A layer of width h multiplies a token by about 12 h^2 weights, and each pair of a token and one before it by 2 h in
    the attention, so that a pair is h / 6 h^2 = 1 / 6h of a token. The head is V h weights beside the layers' 12 h^2 L.
    """

    pair: float = 0.0
    """Of a token that sees another."""
    head: float = 0.0
    """Of a completion's token beyond other tokens."""
    packed: bool = True
    """Whether a list's prompt is read once, and not once for each completion."""

    def of(self, example: dict) -> float:
        """A list's cost."""
        prompt, sizes = len(example["prompt_ids"]), [len(ids) for ids in example["completion_ids"]]
        times = 1 if self.packed else len(sizes)
        pairs = times * prompt**2 / 2 + sum(size * (prompt + size / 2) for size in sizes)
        return times * prompt + (1 + self.head) * sum(sizes) + self.pair * pairs


class StepLists(Dataset[list[dict]]):
    """Item s is one process's share of step s's lists: about as costly as every other's."""

    def __init__(
        self,
        lists: Sequence[dict],
        plan: Sequence[Sequence[int]],
        *,
        rank: int,
        world_size: int,
        cost: Cost = Cost(),  # noqa: B008, frozen
    ) -> None:
        self.lists = lists
        self.plan = plan
        self.rank = rank
        self.world_size = world_size
        self.cost = cost

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> list[dict]:
        lists = [self.lists[row] for row in self.plan[step]]
        before: Counter[str] = Counter()
        for place, example in enumerate(lists):
            identity = str(example.get("id"))
            lists[place] = example | {"key": draw_key(step + 1, identity, before[identity])}
            before[identity] += 1
        return lists if self.world_size == 1 else balanced_shares(lists, self.world_size, self.cost.of)[self.rank]


def balanced_shares(lists: Sequence[dict], count: int, cost: Callable[[dict], float]) -> list[list[dict]]:
    """Lists dealt out so that the costliest share is as cheap as two ways of dealing make it.

    The largest differencing method: every list begins as a deal of its own, and the two most uneven deals become one,
    the costly shares of one beside the cheap shares of the other. Where lists are few, the costliest first, each to
    the share that has least so far, may be better.

    Source: Karmarkar and Karp 1982; for more than two shares as in Korf 2009, "Multi-way number partitioning".
    """
    costs = [cost(example) for example in lists]
    deals = (_by_differences(costs, count), _costliest_first(costs, count))
    best = min(deals, key=lambda deal: max(sum(costs[i] for i in share) for share in deal))
    return [[lists[i] for i in share] for share in best]


def _by_differences(costs: Sequence[float], count: int) -> list[list[int]]:
    empty: list[tuple[float, list[int]]] = [(0.0, []) for _ in range(count - 1)]
    deals = [(-cost, place, [(cost, [place]), *empty]) for place, cost in enumerate(costs)]
    deals = deals or [(0.0, 0, [(0.0, []), *empty])]
    heapify(deals)
    while len(deals) > 1:
        (_, place, one), (_, _, other) = heappop(deals), heappop(deals)
        pairs = zip(one, reversed(other), strict=True)
        shares = sorted(((a + b, [*x, *y]) for (a, x), (b, y) in pairs), key=itemgetter(0), reverse=True)
        heappush(deals, (shares[-1][0] - shares[0][0], place, shares))
    return [members for _, members in deals[0][2]]


def _costliest_first(costs: Sequence[float], count: int) -> list[list[int]]:
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += costs[place]
    return shares


def width(example: dict) -> int:
    """Tokens of a list's longest row."""
    return len(example["prompt_ids"]) + max(len(ids) for ids in example["completion_ids"])


def packed_size(example: dict) -> int:
    """Tokens of a list's prompt, once, and of its completions; a packed row may have fewer of it."""
    return len(example["prompt_ids"]) + sum(map(len, example["completion_ids"]))


def micro_batches(examples: Sequence[dict], *, tokens_per_batch: int, packed: bool = False) -> list[list[dict]]:
    """Cut lists into batches of at most `tokens_per_batch` tokens, counted as the model reads them.

    Padded rows: padding included, lists of like length together. Packed: the largest list first, each into the first
    batch that has room for it, without what its prompt shares with that of the batch's first list. A list that is
    larger alone is a batch alone.
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
    for example in _alike_together(examples):
        size = packed_size(example)
        shared = [_shared(batch[0], example) for batch in batches]
        place = next((b for b, left in enumerate(room) if size - shared[b] <= left), None)
        if place is None:
            batches.append([example])
            room.append(tokens_per_batch - size)
        else:
            batches[place].append(example)
            room[place] -= size - shared[place]
    return batches


def _alike_together(examples: Sequence[dict]) -> list[dict]:
    """The largest list first, and behind it those whose prompts begin as its own does, the larger ones first."""
    alike: dict[tuple[int, ...], list[dict]] = {}
    for example in sorted(examples, key=packed_size, reverse=True):
        alike.setdefault(_beginning(example) or (-1, len(alike)), []).append(example)
    return [example for own in alike.values() for example in own]


def _beginning(example: dict) -> tuple[int, ...]:
    """What prompts must have in common for their lists to be put into one batch for it; empty for a shorter prompt."""
    prompt = example["prompt_ids"]
    return tuple(prompt[:SHARED_PROMPT]) if len(prompt) >= SHARED_PROMPT else ()


def _shared(one: dict, other: dict) -> int:
    """Tokens of two lists' prompts that stand once if they are in one batch, where those decide about batches."""
    if not _beginning(one) or _beginning(one) != _beginning(other):
        return 0
    return agree(one["prompt_ids"], other["prompt_ids"])


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
    wanted = max(_on_every_process(accelerator, [len(batches)]))[0]
    batches = cut_further(batches, wanted)
    return batches + [[] for _ in range(wanted - len(batches))]


def agreed_parts(
    batches: Sequence[list[dict]], *, tokens_per_batch: int, accelerator: Accelerator
) -> list[tuple[list[dict], list[list[int]], int]]:
    """Micro-batches of `agreed_micro_batches`, each with how it is cut into passes, and how many are made of it.

    One that is a single list too large for a pass is cut by completions. Where there are several processes, those of
    most parts come first, and all make as many passes of every batch as the process that needs most.

    Returns:
        A batch, the places of its completions in each part, and the passes, at least as many as parts.
    """
    cut = [(batch, _parts_of(batch, tokens_per_batch)) for batch in batches]
    if accelerator.num_processes == 1:
        return [(batch, parts, len(parts)) for batch, parts in cut]
    cut.sort(key=lambda pair: -len(pair[1]))
    counts = map(max, zip(*_on_every_process(accelerator, [len(parts) for _, parts in cut]), strict=True))
    return [(batch, parts, count) for (batch, parts), count in zip(cut, counts, strict=True)]


def _parts_of(batch: Sequence[dict], tokens_per_batch: int) -> list[list[int]]:
    if len(batch) == 1:
        return list_parts(batch[0], tokens_per_batch)
    return [list(range(sum(len(example["completion_ids"]) for example in batch)))]


def _on_every_process(accelerator: Accelerator, counts: Sequence[int]) -> list[list[int]]:
    """The same number of counts of every process."""
    own = torch.tensor([counts], device=accelerator.device)
    return accelerator.gather(own).tolist()


def cut_further(batches: list[list[dict]], count: int) -> list[list[dict]]:
    """Halve the largest batches until there are `count`, or until every batch is one list."""
    batches = list(batches)
    while len(batches) < count and max(map(len, batches), default=0) > 1:
        largest = batches.pop(max(range(len(batches)), key=lambda b: len(batches[b])))
        batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return batches
