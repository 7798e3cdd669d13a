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
