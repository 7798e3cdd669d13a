"""Fixtures and settings that every test shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    """Models of a few thousand parameters are fastest with one thread; a test's random numbers are its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """Public data sets and models that lie beside a developer's checkout; nothing of them is in the repository."""
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not on this machine")
    return SHARED


@pytest.fixture
def ragged() -> list[dict]:
    """Tokenised lists of one to eight completions, some of equal length."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 40, (length,), generator=generator).tolist()

    shapes = ((4, (5, 9)), (1, (3, 3, 1)), (7, (2, 6, 2, 2)), (3, (1, 4, 6, 2, 3, 4, 4, 1)), (2, (5,)))
    return [
        {"prompt_ids": [1, *ids(p - 1)], "completion_ids": [ids(n) for n in sizes], "grades": [float(n) for n in sizes]}
        for p, sizes in shapes
    ]
