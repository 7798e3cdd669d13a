"""Steps on lists that share more than prompts: tries against prompts alone, and TRL's DPOTrainer on all pairs."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import count
from operator import mul
from pathlib import Path

import torch
import trl
from trl.trainer import utils as trl_utils

from align.bench.measure import allocated_bytes, alternate, machine
from align.bench.step import TOLERANCE
from align.bench.step.shapes import save
from align.bench.step.sides import Ours, Side, Theirs
from align.data.steps import packed_size
from align.packing import packed_collate
from align.packing.batch import Example, collate
from align.types import ListBatch

ROUNDS = 3
SHAPE, VOCABULARY = "256x4 V=32k", 32000
LONGEST_OF_TRL = 15_000
"""Tokens of padded rows beyond which TRL is left out: a step would take minutes."""


class PromptsOnly(Ours):
    """Our step where only a list's prompt stands once, by its column and not by its tokens."""

    def collate(self, examples: list[Example]) -> ListBatch:
        """Laid out with first tokens of completions that differ, in whose places the real ones are put."""
        firsts = torch.tensor([ids[0] for e in examples for ids in e["completion_ids"]])
        marks = count(-1, -1)
        marked = [e | {"completion_ids": [[next(marks), *ids[1:]] for ids in e["completion_ids"]]} for e in examples]
        batch = packed_collate(marked, pays=sys.maxsize)
        ids = torch.where(batch.input_ids < 0, firsts[(-1 - batch.input_ids).clamp(min=0)], batch.input_ids)
        targets = collate(examples, pad_id=0).targets
        return replace(batch, input_ids=ids, targets=targets).to(self.trained[0].device)


def run() -> dict[str, object]:
    """One thread on a CPU; float32, cached reference, the pairwise logistic loss over all pairs of a list."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    trl_utils._use_triton = lambda device: True  # its head takes completion positions only, as on a GPU
    cases = [_case(name, lists, device) for name, lists in PATTERNS.items()]
    return {"machine": machine(device) | {"trl": trl.__version__}, "date": str(date.today()), "cases": cases}


def _case(name: str, lists: Callable[[torch.Generator], list[Example]], device: torch.device) -> dict[str, object]:
    batches = [lists(torch.Generator().manual_seed(seed)) for seed in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), SHAPE)
        sides: dict[str, Side] = {
            "tries": Ours(folder, batches, device),
            "prompts alone": PromptsOnly(folder, batches, device),
        }
        if (padded := max(map(_pair_tokens, batches))) <= LONGEST_OF_TRL:
            sides["trl best"] = Theirs(folder, batches, device)
        results = alternate({label: side.step for label, side in sides.items()}, ROUNDS, device)
        for label, side in sides.items():
            results[label]["allocated_bytes"] = allocated_bytes(side.step, device)
            _check(side, sides["tries"])
    tokens = {"tries": packed_collate(batches[0]).input_ids.numel(), "trl best": padded}
    tokens["prompts alone"] = sum(map(packed_size, batches[0]))
    clock = "cpu_median_ms" if device.type == "cpu" else "median_ms"
    print(name)
    for label, figures in results.items():
        figures |= {"tokens": tokens[label], "times_tokens": tokens[label] / tokens["tries"]}
        figures["times_ours"] = figures[clock] / results["tries"][clock]
        print("  " + label.ljust(16) + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    return {"name": name, "implementations": results}


def _check(side: Side, ours: Side) -> None:
    steps = min(len(side.losses), len(ours.losses))
    difference = max(abs(a - b) for a, b in zip(side.losses[:steps], ours.losses[:steps], strict=True))
    if not difference <= TOLERANCE[side.dtype]:
        raise RuntimeError(f"losses differ by {difference:.2g}")


def _pair_tokens(examples: list[Example]) -> int:
    """Tokens of the rows of all pairs, without padding."""
    others = [len(e["completion_ids"]) - 1 for e in examples]
    rows = [sum(len(e["prompt_ids"]) + len(ids) for ids in e["completion_ids"]) for e in examples]
    return sum(map(mul, others, rows))


def _ids(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def _list(prompt: list[int], completions: list[list[int]]) -> Example:
    return {"prompt_ids": prompt, "completion_ids": completions, "grades": [-float(k) for k in range(len(completions))]}


def _resampled(generator: torch.Generator) -> list[Example]:
    lists = []
    for _ in range(4):
        prompt, common = _ids(generator, 256), _ids(generator, 128)
        lists.append(_list(prompt, [[*common, *_ids(generator, 128)] for _ in range(2)]))
    return lists


def _turns(generator: torch.Generator) -> list[Example]:
    turns = [_ids(generator, 64) for _ in range(5)]
    branches = [[*sum(turns[:turn], []), *_ids(generator, 64)] for turn in range(5)]
    return [_list(_ids(generator, 64), [sum(turns, []), *branches])]


def _search(generator: torch.Generator) -> list[Example]:
    leaves: list[list[int]] = [[]]
    for _ in range(4):
        leaves = [[*leaf, *_ids(generator, 32)] for leaf in leaves for _ in range(2)]
    return [_list(_ids(generator, 128), leaves)]


def _system(pairs: int) -> Callable[[torch.Generator], list[Example]]:
    def lists(generator: torch.Generator) -> list[Example]:
        system = _ids(generator, 600)
        return [
            _list([*system, *_ids(generator, 20)], [_ids(generator, 32), _ids(generator, 32)]) for _ in range(pairs)
        ]

    return lists


PATTERNS: dict[str, Callable[[torch.Generator], list[Example]]] = {
    "4 pairs, rejected resampled from the middle (256 + 128 + 128)": _resampled,
    "a trajectory of 5 turns of 64 with a branch before each": _turns,
    "16 leaves of a binary search tree, 32 tokens an edge": _search,
    "8 pairs with one system prompt of 600": _system(8),
    "64 pairs with one system prompt of 600": _system(64),
}
