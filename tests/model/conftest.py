"""A tiny random model on disk, and lists of token ids for it."""

from pathlib import Path

import pytest
import torch

from align.packing.batch import collate
from align.types import ListBatch

VOCABULARY = 40


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, save_llama) -> Path:
    """The folder of a tiny Llama that has dropout."""
    return save_llama(tmp_path_factory.mktemp("tiny_llama"), num_key_value_heads=2, attention_dropout=0.3)


@pytest.fixture
def lists() -> list[dict]:
    """Lists of two and three completions of different lengths."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [
        {"prompt_ids": [1, *ids(p)], "completion_ids": [ids(n) for n in sizes], "grades": [float(n) for n in sizes]}
        for p, sizes in ((2, (3, 5)), (4, (1, 2, 6)), (1, (4, 2)))
    ]


@pytest.fixture
def batch(lists) -> ListBatch:
    """All lists in one batch."""
    return collate(lists, pad_id=2)
