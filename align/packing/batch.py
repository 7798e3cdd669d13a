"""Tokenised lists -> ListBatch."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from align.types import ListBatch

Example = dict[str, Any]
"""A tokenised list: prompt_ids, completion_ids, grades, any of TOKEN_COLUMNS, and a `key` from `draw_key`.

`learn_at`, where a list has it, says which tokens of each completion are learnt, by their places in it, ascending; the
others (what a tool or a user said in the middle of a trajectory) are read and count in nothing. A negative place is one
of the prompt, -1 its last token.
"""

TOKEN_COLUMNS = ("reference_logprobs", "token_rewards", "token_weights")
"""Columns with a number per learnt token, in all lists or in none."""

LIST_COLUMNS = {"loss_weight": "weights", "margin": "margins"}
"""Columns with a number per list, in all lists or in none, and what a ListBatch calls them."""


def collate(examples: Sequence[Example], *, pad_id: int) -> ListBatch:
    """Put every completion behind its prompt in a row of its own, right-padded.

    Args:
        examples: lists of any K; with a column of TOKEN_COLUMNS in all of them or in none.
        pad_id: fills the rows' ends; no position that counts can see it.
    """
    rows = [(e["prompt_ids"], ids) for e in examples for ids in e["completion_ids"]]
    learnt = [at for e in examples for at in learnt_places(e)]
    width = max(len(prompt) + len(ids) for prompt, ids in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    places = torch.full((len(rows), max(map(len, learnt))), -1)
    for r, ((prompt, ids), at) in enumerate(zip(rows, learnt, strict=True)):
        input_ids[r, : len(prompt) + len(ids)] = torch.tensor([*prompt, *ids])
        places[r, : len(at)] = at + (r * width + len(prompt))
    return ListBatch(
        input_ids=input_ids,
        targets=tokens_at(places, input_ids),
        predict_at=(places - 1).clamp_(min=0),
        ends_at=torch.tensor([r * width + len(prompt) + len(ids) - 1 for r, (prompt, ids) in enumerate(rows)]),
        **list_fields(examples, places.shape[1]),
    )


def tokens_at(places: Int[Tensor, "N C"], input_ids: Int[Tensor, "R T"]) -> Int[Tensor, "N C"]:
    """The tokens at flat indices r * T + t; -1 where there is no place."""
    return input_ids.flatten()[places].masked_fill_(places < 0, -1)


def learnt_places(example: Mapping[str, Any]) -> list[Int[Tensor, " _"]]:
    """Of every completion of a list the places of its learnt tokens: `learn_at`, or all where the list has none."""
    if example.get("learn_at") is None:
        return [torch.arange(len(ids)) for ids in example["completion_ids"]]
    return [torch.tensor(at, dtype=torch.long) for at in example["learn_at"]]


def learnt_counts(example: Mapping[str, Any]) -> list[int]:
    """How many tokens of each completion of a list are learnt."""
    places = example.get("learn_at")
    return [*map(len, example["completion_ids"] if places is None else places)]


def list_fields(examples: Sequence[Example], width: int) -> dict[str, Any]:
    """What a ListBatch says by list and completion, however its rows are built; `width` is that of its targets."""
    sizes = [len(e["completion_ids"]) for e in examples]
    keys = {"keys": torch.tensor([e["key"] for e in examples])} if "key" in examples[0] else {}
    return {
        "list_index": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        "slot": torch.cat([torch.arange(k) for k in sizes]),
        "grades": _pad([e["grades"] for e in examples], max(sizes), torch.float64),
        "list_mask": torch.arange(max(sizes)) < torch.tensor(sizes)[:, None],
        **keys,
        **{
            field: torch.tensor([e[name] for e in examples], dtype=torch.float64)
            for name, field in LIST_COLUMNS.items()
            if name in examples[0]
        },
    } | {
        name: _pad([values for e in examples for values in e[name]], width)
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
