"""What trainers on pairs have in common: 2B rows of which row r and row B + r are a pair."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from align.packing.batch import Example
from align.trl.micro_batches import MicroBatch, check_collated, micro_batch
from align.trl.trainer import PackedTrainer


class PairTrainer(PackedTrainer):
    """Of the trainers whose loss compares the two rows of a pair."""

    def _micro_batch(self, inputs: Mapping[str, Any], first: int) -> MicroBatch:
        check_collated(inputs, ("input_ids",))
        return micro_batch(inputs, couples(inputs["input_ids"]), first)

    def _units(self, micro: MicroBatch) -> list[list[Example]]:
        """A pair's lists together: one, or two where the rows have no beginning in common."""
        pairs = len(micro.counts) // 2
        units: list[list[Example]] = [[] for _ in range(pairs)]
        for example in micro.lists:
            units[(example["rows"][0] - micro.first) % pairs].append(example)
        return units

    def _both(self, micro: MicroBatch, rows: Tensor, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Rows' values as [2, n], of the micro-batch's n pairs that some of these rows are of, and which those are.

        A row without a learnt token is in no pass: its values are 0.
        """
        pairs = len(micro.counts) // 2
        places = rows - micro.first
        here = torch.zeros(2 * pairs, dtype=torch.bool, device=rows.device)
        here[places] = True
        present = here.view(2, pairs).any(dim=0)
        spread = {n: v.new_zeros(2 * pairs).index_put((places,), v) for n, v in values.items()}
        return {name: value.view(2, pairs)[:, present] for name, value in spread.items()}, present


def couples(rows: Tensor) -> list[tuple[int, int]]:
    """Numbers of the rows of every pair."""
    pairs = len(rows) // 2
    return [(row, pairs + row) for row in range(pairs)]
