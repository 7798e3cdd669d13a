"""Tokenised lists -> ListBatch."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from align.types import ListBatch

Example = dict[str, Any]
"""A tokenised list: prompt_ids, completion_ids, grades, any of TOKEN_COLUMNS, and a `key` from `draw_key`."""

TOKEN_COLUMNS = ("reference_logprobs", "token_rewards", "token_weights")
"""Columns with a number per completion token, in all lists or in none."""


def collate(examples: Sequence[Example], *, pad_id: int) -> ListBatch:
    """Put every completion behind its prompt in a row of its own, right-padded.

    Args:
        examples: lists of any K; with a column of TOKEN_COLUMNS in all of them or in none.
        pad_id: fills the rows' ends; no position that counts can see it.
    """
    rows = [(e["prompt_ids"], ids) for e in examples for ids in e["completion_ids"]]
    width = max(len(prompt) + len(ids) for prompt, ids in rows)
    longest = max(len(ids) for _, ids in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    targets = torch.full((len(rows), longest), -1)
    predict_at = torch.zeros(len(rows), longest, dtype=torch.long)
    for r, (prompt, ids) in enumerate(rows):
        input_ids[r, : len(prompt) + len(ids)] = torch.tensor([*prompt, *ids])
        targets[r, : len(ids)] = torch.tensor(ids)
        first = r * width + len(prompt) - 1
        predict_at[r, : len(ids)] = torch.arange(first, first + len(ids))
    return ListBatch(
        input_ids=input_ids,
        targets=targets,
        predict_at=predict_at,
        ends_at=torch.tensor([r * width + len(prompt) + len(ids) - 1 for r, (prompt, ids) in enumerate(rows)]),
        **list_fields(examples),
    )


def list_fields(examples: Sequence[Example]) -> dict[str, Any]:
    """What a ListBatch says by list and completion, however its rows are built."""
    sizes = [len(e["completion_ids"]) for e in examples]
    keys = {"keys": torch.tensor([e["key"] for e in examples])} if "key" in examples[0] else {}
    longest = max(len(ids) for e in examples for ids in e["completion_ids"])
    return {
        "list_index": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        "slot": torch.cat([torch.arange(k) for k in sizes]),
        "grades": _pad([e["grades"] for e in examples], max(sizes), torch.float64),
        "list_mask": torch.arange(max(sizes)) < torch.tensor(sizes)[:, None],
        **keys,
    } | {
        name: _pad([values for e in examples for values in e[name]], longest)
        for name in TOKEN_COLUMNS
        if name in examples[0]
    }


def draw_key(step: int, identity: str, repeat: int) -> int:
    """What the random draws about a list follow from.

    Args:
        step: of the optimizer; 0 where nothing is trained.
        identity: the row's id.
        repeat: how often the step had a row of this id before.
    """
    digest = hashlib.blake2b(f"{step} {repeat} {identity}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _pad(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    padded = torch.zeros(len(rows), width, dtype=dtype)
    for r, row in enumerate(rows):
        padded[r, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return padded
