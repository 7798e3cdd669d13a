"""A number for every learnt token of every list, as a column; among them T-REG's token rewards from two contexts."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from align.model.reference import flat_values
from align.model.value_cache import Found
from align.packing.batch import learnt_counts

CONTEXTS = ("better_ids", "worse_ids")
LIST_COLUMNS = ("prompt_ids", "completion_ids", "learn_at", "grades")


def contrast_rewards(lists: Dataset, read: Callable[..., Found]) -> np.ndarray:
    """T-REG's token rewards of all learnt tokens, one list after the other.

    rhat_t = sigmoid(log p_ref(y_t | better, y_<t) - log p_ref(y_t | worse, y_<t)) - 0.5

    Args:
        lists: with better_ids and worse_ids.
        read: `read_lists` of a policy.

    Source: T-REG, arXiv:2412.02685 (published notes).
    """
    contexts = lists.map(
        _one_list_per_context,
        batched=True,
        remove_columns=lists.column_names,
        features=Features({n: f for n, f in lists.features.items() if n in LIST_COLUMNS} | {"better": Value("bool")}),
        desc="contexts",
    )
    stored = read(contexts, label="token rewards")["logprobs"]
    better = np.array(contexts["better"][:])
    sides = [flat_values(contexts.select(np.flatnonzero(better == side)), stored) for side in (True, False)]
    return squashed(sides[0] - sides[1])


def _one_list_per_context(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Every list under each of its contexts: all completions under one, or each under its own."""
    own = [name for name in ("completion_ids", "learn_at") if name in batch]
    out: dict[str, list[Any]] = {"prompt_ids": [], "grades": [], "better": []} | {name: [] for name in own}
    for row, completions in enumerate(batch["completion_ids"]):
        every = list(range(len(completions)))
        for side in CONTEXTS:
            contexts = batch[side][row]
            for context, places in zip(contexts, [every] if len(contexts) == 1 else [[k] for k in every], strict=True):
                out["prompt_ids"].append(context)
                for name in own:
                    out[name].append([batch[name][row][k] for k in places])
                out["grades"].append([0.0] * len(places))
                out["better"].append(side == "better_ids")
    return out


def with_token_column(lists: Dataset, name: str, flat: np.ndarray) -> Dataset:
    """The lists with a column of one float32 per learnt token, from all lists' values one after the other."""
    lengths = learnt_in(lists)
    inner = pa.ListArray.from_arrays(_offsets([n for row in lengths for n in row]), pa.array(flat, pa.float32()))
    outer = pa.ListArray.from_arrays(_offsets([len(row) for row in lengths]), inner)
    fingerprint = Hasher.hash([lists._fingerprint, name, hashlib.sha256(flat.tobytes()).hexdigest()])
    return lists.add_column(name, outer, new_fingerprint=fingerprint, feature=List(List(Value("float32"))))


def learnt_in(lists: Dataset) -> list[list[int]]:
    """How many tokens of every completion are learnt."""
    names = [name for name in ("completion_ids", "learn_at") if name in lists.column_names]
    return [learnt_counts(row) for row in lists.select_columns(names)]


def _offsets(sizes: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))


def squashed(ratio: np.ndarray) -> np.ndarray:
    return (torch.from_numpy(ratio).sigmoid() - 0.5).numpy()
