"""The float32 tile that logits pass through, kept between calls on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

_kept: list[Tensor] = []


@contextmanager
def logit_tile(rows: int, columns: int, like: Tensor) -> Iterator[Float[Tensor, "rows columns"]]:
    """An uninitialised tile [rows, columns] in the dtype and on the device of `like`.

    On a CPU the largest float32 tile so far is kept: fresh memory would be mapped page by page in every call, a quarter
    of the time of the product that fills it. A GPU's allocator already keeps its memory.
    """
    if like.device.type != "cpu" or like.dtype != torch.float32:
        yield like.new_empty(rows, columns)
        return
    memory = _kept.pop() if _kept else like.new_empty(0)
    if memory.numel() < rows * columns:
        memory = like.new_empty(rows * columns)
    try:
        yield memory[: rows * columns].view(rows, columns)
    finally:
        _kept[:] = [memory]


def release() -> None:
    """Give the kept tile back."""
    _kept.clear()
