"""What the main process finds out, and all act on."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def told_by_main(look: Callable[[], T]) -> T:
    """What the main process sees; every process must call this."""
    found: list[T] = [look()] if PartialState().is_main_process else [None]  # type: ignore[list-item]
    return broadcast_object_list(found)[0]
