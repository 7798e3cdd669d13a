"""Every code path of this machine, one at a time, and memory that is never zero by luck."""

from collections.abc import Iterator

import pytest
import torch

from align.kernels import native


@pytest.fixture(params=["torch", *native.LEVELS])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; skipped where the C library or the machine lacks it."""
    with native.forced(request.param):
        if native.instruction_set() != request.param:
            pytest.skip(f"{request.param} is not available here (C kernels: {native.library is not None})")
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
