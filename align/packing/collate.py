"""Tokenised lists -> a ListBatch of one row without padding, in which every prompt stands once."""

from collections.abc import Sequence

import torch

from align.packing.batch import Example, list_fields
from align.types import ListBatch


def packed_collate(examples: Sequence[Example]) -> ListBatch:
    """Lay lists behind one another in one row, each as its prompt and then its completions, the longest first.

    Positions restart at the prompt's end with every completion, and the prompt's last position predicts the first token
    of each: log-probabilities are those of separate sequences, under attention that is told `segments`.

    Args:
        examples: lists of any K; with a column of `batch.TOKEN_COLUMNS` in all of them or in none.

    Source: ours
    """
    completions = [ids for e in examples for ids in e["completion_ids"]]
    targets = torch.full((len(completions), max(map(len, completions))), -1)
    predict_at = torch.zeros_like(targets)
    ends_at = torch.zeros(len(completions), dtype=torch.long)
    tokens: list[int] = []
    positions: list[torch.Tensor] = []
    segments: list[tuple[int, ...]] = []
    n = 0
    for example in examples:
        prompt, own = example["prompt_ids"], example["completion_ids"]
        order = sorted(range(len(own)), key=lambda k: -len(own[k]))
        segments.append((len(prompt), *(len(own[k]) for k in order)))
        tokens += prompt
        positions.append(torch.arange(len(prompt)))
        last = len(tokens) - 1
        for k in order:
            size, start = len(own[k]), len(tokens)
            targets[n + k, :size] = torch.tensor(own[k])
            predict_at[n + k, :1] = last
            predict_at[n + k, 1:size] = torch.arange(start, start + size - 1)
            tokens += own[k]
            ends_at[n + k] = len(tokens) - 1
            positions.append(torch.arange(len(prompt), len(prompt) + size))
        n += len(own)
    return ListBatch(
        input_ids=torch.tensor(tokens)[None],
        targets=targets,
        predict_at=predict_at,
        ends_at=ends_at,
        position_ids=torch.cat(positions)[None],
        segments=tuple(segments),
        **list_fields(examples),
    )
