"""The rows that a forward pass is asked for, told to the layers that need not compute the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

_ASKED: ContextVar[Int[Tensor, " M"] | None] = ContextVar("asked_rows", default=None)


@contextmanager
def asked_rows(rows: Int[Tensor, " M"]) -> Iterator[None]:
    """Inside, modules whose forward is `on_asked_rows` compute these rows only.

    Args:
        rows: distinct flat indices r * T + t into a batch of R rows of T positions.
    """
    token = _ASKED.set(rows)
    try:
        yield
    finally:
        _ASKED.reset(token)


def on_asked_rows(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method for a module that treats every row alone: computed where asked for, 0 elsewhere."""

    def on_rows(module: nn.Module, x: Float[Tensor, "R T I"], *args: Any, **kwargs: Any) -> Float[Tensor, "R T O"]:
        rows = _ASKED.get()
        if rows is None:
            return forward(module, x, *args, **kwargs)
        asked = forward(module, x.flatten(0, 1)[rows][None], *args, **kwargs)[0]
        everywhere = asked.new_zeros(x.shape[:2].numel(), asked.shape[-1])
        return everywhere.index_copy(0, rows, asked).unflatten(0, x.shape[:2])

    return on_rows
