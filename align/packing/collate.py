"""Tokenised lists -> a ListBatch of one row without padding, in which what sequences begin with stands once."""

from collections.abc import Sequence

import torch

from align.packing.batch import Example, learnt_places, list_fields, tokens_at
from align.packing.trie import PAYS, grow
from align.types import ListBatch


def packed_collate(examples: Sequence[Example], *, pays: int = PAYS) -> ListBatch:
    """Lay lists in one row as a trie of their sequences, each a prompt and a completion.

    Every list's prompt stands once, and so does what some completions of it, or lists, have in common besides, where
    that saves something. A position predicts the next token of every sequence that it belongs to: log-probabilities are
    those of separate sequences, under attention that is told `branches`.

    Args:
        examples: lists of any K; with a column of `batch.TOKEN_COLUMNS` in all of them or in none.
        pays: tokens that a fork has to save; a prompt is shared whatever it saves.

    Source: ours
    """
    learnt = [at for e in examples for at in learnt_places(e)]
    prompts = [len(e["prompt_ids"]) for e in examples for _ in e["completion_ids"]]
    sequences = [[*e["prompt_ids"], *ids] for e in examples for ids in e["completion_ids"]]
    groups = [number for number, e in enumerate(examples) for _ in e["completion_ids"]]
    trie = grow(sequences, groups, pays=pays)
    input_ids = torch.tensor(trie.tokens)[None]
    places, predict_at = torch.full((2, len(learnt), max(map(len, learnt))), -1)
    for n, (prompt, at, rows) in enumerate(zip(prompts, learnt, trie.rows, strict=True)):
        places[n, : len(at)] = rows[prompt + at]
        predict_at[n, : len(at)] = rows[prompt + at - 1]
    return ListBatch(
        input_ids=input_ids,
        targets=tokens_at(places, input_ids),
        predict_at=predict_at.clamp_(min=0),
        ends_at=torch.stack([rows[-1] for rows in trie.rows]),
        position_ids=trie.positions[None],
        branches=trie.branches,
        **list_fields(examples, places.shape[1]),
    )
