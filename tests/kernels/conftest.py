"""Every code path of this machine, one at a time, and memory that is never zero by luck.

With a CUDA device, `pytest -m gpu --confcutdir tests/kernels tests/kernels` runs the same tests on it; it needs torch,
cuda-core, jaxtyping and hypothesis, nothing else of the project's requirements. With ALIGN_KERNELS_ON=arm they run for
an Arm, as on_arm.py says.
"""

import os
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from align.kernels import cuda, native

if os.environ.get("ALIGN_KERNELS_ON") == "arm":  # before the tests ask for the instruction sets
    import on_arm

    on_arm.install()

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def _need_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not cuda.installed():
        pytest.skip("no cuda-core, or a torch that is not built for CUDA")


@pytest.fixture(params=["torch", *native.LEVELS, GPU])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, skipped where the C library or the machine lacks it; last, tensors on a GPU."""
    if request.param == "cuda":
        _need_device()
        with torch.device("cuda"):
            yield request.param
        return
    with native.forced(request.param):
        if native.instruction_set() != request.param:
            pytest.skip(f"{request.param} is not available here (C kernels: {native.library is not None})")
        yield request.param


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are made: the CPU with its best instruction set, or a GPU."""
    if request.param == "cuda":
        _need_device()
    with torch.device(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN, and random numbers are a test's own."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
