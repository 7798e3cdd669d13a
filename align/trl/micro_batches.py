"""TRL's padded micro-batches -> lists that share their prompts, and an optimizer step's lists in packed passes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from align.data.steps import packed_size
from align.errors import UserError
from align.packing.batch import Example

Sequences = list[np.ndarray]


@dataclass(frozen=True)
class MicroBatch:
    """What a collator gave for one call of `training_step`, as lists.

    Every list has, besides what `align.packing` reads, `rows`: where its completions stand among the step's rows.
    """

    inputs: Mapping[str, Any]
    lists: list[Example]
    first: int
    """Row of the step that is this one's first."""
    counts: Int[Tensor, " R"]
    """Learnt tokens of every row that something predicts."""

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.counts))


class Step:
    """The micro-batches of one optimizer step, and what was found out about their rows."""

    def __init__(self, micros: list[MicroBatch], device: torch.device) -> None:
        self.micros, self.device = micros, device
        self.baselines: list[float] = []
        """What each micro-batch is measured from (KTO)."""
        self.counts = torch.cat([micro.counts for micro in micros]).to(device)
        self.balance: dict[int, Tensor] = {}
        """The load-balancing loss of each micro-batch, by its first row, where experts have one."""
        self.table: dict[str, Tensor] = defaultdict(lambda: torch.zeros(len(self.counts), device=device))

    def keep(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Remember rows' values for the metrics."""
        for name, value in values.items():
            self.table[name][rows] = value.detach().float()


def micro_batch(inputs: Mapping[str, Any], together: Sequence[Sequence[int]], first: int) -> MicroBatch:
    """Padded rows as lists.

    Args:
        inputs: `input_ids`, `attention_mask` and `completion_mask` [R, T], of ours or of anyone's collator.
        together: rows that may have a beginning in common.
    """
    sequences, places = unpadded(inputs)
    return of_sequences(inputs, sequences, places, together, first)


def check_collated(inputs: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a batch of a collator that gives other names.

    Raises:
        UserError: names the first that lacks.
    """
    if lacking := [name for name in names if name not in inputs]:
        raise UserError(f"data_collator: a batch has no {lacking[0]!r}, only {', '.join(sorted(inputs))}")


def unpadded(inputs: Mapping[str, Any], prefix: str = "") -> tuple[Sequences, Sequences]:
    """Rows of token ids without padding, and the places of those that are learnt."""
    names = [f"{prefix}{name}" for name in ("input_ids", "attention_mask", "completion_mask")]
    check_collated(inputs, names)
    ids, seen, learnt = (inputs[name].cpu().numpy() for name in names)
    kept = [row.astype(bool) for row in seen]
    sequences = [row[keep] for row, keep in zip(ids, kept, strict=True)]
    return sequences, [np.flatnonzero(row[keep]) for row, keep in zip(learnt, kept, strict=True)]


def of_sequences(
    inputs: Mapping[str, Any], sequences: Sequences, places: Sequences, together: Sequence[Sequence[int]], first: int
) -> MicroBatch:
    """As micro_batch, from what `unpadded` gives."""
    places = [at[at > 0] for at in places]  # nothing predicts a row's first token
    lists: list[Example] = []
    for members in together:
        lists += _lists(sequences, places, members, first)
    return MicroBatch(inputs, lists, first, torch.tensor([len(at) for at in places]))


def _lists(sequences: Sequences, places: Sequences, members: Sequence[int], first: int) -> list[Example]:
    """One list where the rows share a beginning, one of each row otherwise; none of rows with nothing to learn."""
    shared = _shared(sequences, places, members)
    if not shared:
        return [e for row in members if len(members) > 1 for e in _lists(sequences, places, [row], first)]
    if not any(len(places[row]) for row in members):
        return []
    example = {
        "prompt_ids": sequences[members[0]][:shared].tolist(),
        "completion_ids": [sequences[row][shared:].tolist() for row in members],
        "learn_at": [(places[row] - shared).tolist() for row in members],
        "grades": [0.0] * len(members),
        "rows": [first + row for row in members],
    }
    return [example]


def _shared(sequences: Sequences, places: Sequences, members: Sequence[int]) -> int:
    """Tokens that rows begin with together and of which none is learnt; a token at least is left to each."""
    shortest = min(
        [len(sequences[row]) - 1 for row in members] + [at[0] for at in (places[r] for r in members) if len(at)]
    )
    if shortest < 1:
        return 0
    begun = np.stack([sequences[row][:shortest] for row in members])
    differs = (begun != begun[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def passes(units: Sequence[Sequence[Example]], tokens: int) -> list[list[Example]]:
    """Units in forward passes of at most `tokens` tokens, the largest unit first, each where there is room.

    Args:
        units: lists that a loss needs in one pass.
    """
    sizes = [sum(map(packed_size, unit)) for unit in units]
    batches: list[list[Example]] = []
    room: list[int] = []
    for place in sorted(range(len(units)), key=lambda k: -sizes[k]):
        batch = next((b for b, left in enumerate(room) if sizes[place] <= left), None)
        if batch is None:
            batches.append([*units[place]])
            room.append(tokens - sizes[place])
        else:
            batches[batch] += units[place]
            room[batch] -= sizes[place]
    return batches
