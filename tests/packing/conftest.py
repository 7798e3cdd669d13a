"""Ragged lists of two to eight completions, some of equal length."""

import pytest
import torch


@pytest.fixture
def ragged() -> list[dict]:
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 40, (length,), generator=generator).tolist()

    shapes = ((4, (5, 9)), (1, (3, 3, 1)), (7, (2, 6, 2, 2)), (3, (1, 4, 6, 2, 3, 4, 4, 1)), (2, (5,)))
    return [
        {"prompt_ids": [1, *ids(p - 1)], "completion_ids": [ids(n) for n in sizes], "grades": [float(n) for n in sizes]}
        for p, sizes in shapes
    ]
