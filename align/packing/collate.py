"""Tokenised lists -> a ListBatch of one row without padding, in which every prompt stands once."""

from collections.abc import Sequence

import torch

from align.packing.batch import Example, learnt_places, list_fields, tokens_at
from align.types import ListBatch


def packed_collate(examples: Sequence[Example]) -> ListBatch:
    """Lay lists behind one another in one row, each as its prompt and then its completions, the longest first.

    Positions restart at the prompt's end with every completion, and the prompt's last position predicts the first token
    of each: log-probabilities are those of separate sequences, under attention that is told `segments`.

    Args:
        examples: lists of any K; with a column of `batch.TOKEN_COLUMNS` in all of them or in none.

    Source: ours
    """
    learnt = [at for e in examples for at in learnt_places(e)]
    places = torch.full((len(learnt), max(map(len, learnt))), -1)
    starts, lasts, ends_at = torch.zeros(3, len(learnt), dtype=torch.long)
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
            starts[n + k], lasts[n + k] = len(tokens), last
            at = learnt[n + k]
            places[n + k, : len(at)] = at + torch.where(at < 0, last + 1, len(tokens))
            tokens += own[k]
            ends_at[n + k] = len(tokens) - 1
            positions.append(torch.arange(len(prompt), len(prompt) + len(own[k])))
        n += len(own)
    input_ids = torch.tensor(tokens)[None]
    return ListBatch(
        input_ids=input_ids,
        targets=tokens_at(places, input_ids),
        predict_at=torch.where(places == starts[:, None], lasts[:, None], places - 1).clamp_(min=0),
        ends_at=ends_at,
        position_ids=torch.cat(positions)[None],
        segments=tuple(segments),
        **list_fields(examples, places.shape[1]),
    )
