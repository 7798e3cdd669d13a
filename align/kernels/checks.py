"""What every kernel refuses before it reads memory: other shapes, other kinds of numbers, settings out of range."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Range:
    """What a setting may be, in words and as a test of one value."""

    words: str
    holds: Callable[[float], bool]


FINITE = Range("a finite number", math.isfinite)


def check_logits(kernel: str, logits: Tensor) -> None:
    """Rows [B, V] of floating numbers, with V of at least 1.

    Raises:
        ValueError: names the kernel and what was given.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        got = f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"{kernel}: logits are {got}; give floating numbers [rows, vocabulary]")
    if logits.shape[1] == 0:
        raise ValueError(f"{kernel}: logits {list(logits.shape)} have no token")


def check_floating(kernel: str, **tensors: Tensor | None) -> None:
    """Floating numbers with at least one axis.

    Raises:
        ValueError: names the kernel, the argument and what was given.
    """
    for name, value in tensors.items():
        if value is not None and not (value.is_floating_point() and value.ndim):
            raise ValueError(f"{kernel}: {name} is {value.dtype} {list(value.shape)}; give rows of floating numbers")


def check_targets(kernel: str, targets: Tensor, rows: tuple[int, ...], *, what: str = "targets") -> None:
    """Whole numbers, one for each row.

    Raises:
        ValueError: names the kernel, the argument and what was given.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"{kernel}: {what} {list(targets.shape)} are {targets.dtype}; give whole numbers")
    if tuple(targets.shape) != tuple(rows):
        raise ValueError(f"{kernel}: {what} {list(targets.shape)} for rows {list(rows)}; give one for each row")


def per_row(
    kernel: str, name: str, value: float | Tensor, logits: Tensor, dtype: torch.dtype, allowed: Range | None = None
) -> Tensor:
    """A setting as one contiguous number for each row of `logits`.

    Args:
        value: a number for all rows, or a tensor of one for each.
        allowed: its range; of a number only, a tensor's values are not read here.

    Raises:
        ValueError: out of its range, no whole number where one is needed, or not one for each row.
    """
    rows = logits.shape[0]
    if isinstance(value, Tensor) and (value.dtype, value.device) == (dtype, logits.device) and value.shape == (rows,):
        return value.contiguous()  # the usual case, some microseconds earlier
    if not isinstance(value, Tensor) and isinstance(value, int | float):
        if not dtype.is_floating_point and not float(value).is_integer():
            raise ValueError(f"{kernel}: {name} is {value}; give a whole number")
        if allowed is not None and not allowed.holds(value):
            raise ValueError(f"{kernel}: {name} is {value:g}; give {allowed.words}")
        return torch.full((rows,), value, dtype=dtype, device=logits.device)
    own = torch.as_tensor(value, device=logits.device)
    if not dtype.is_floating_point and own.is_floating_point():
        raise ValueError(f"{kernel}: {name} is {own.dtype}; give whole numbers")
    if own.numel() != 1 and own.shape != (rows,):
        raise ValueError(f"{kernel}: {name} {list(own.shape)} for {rows} rows; give one number, or one for each row")
    return own.to(dtype).reshape(-1).expand(rows).contiguous()


def check_number(
    kernel: str, name: str, value: float, words: str, *, above: float = 0.0, most: float = math.inf
) -> None:
    """A finite number above one bound and at most another.

    Raises:
        ValueError: names the kernel and the setting.
    """
    if not (above < value <= most and math.isfinite(value)):
        raise ValueError(f"{kernel}: {name} is {value:g}; give {words}")


def readable(tensor: Tensor) -> bool:
    """Whether looking at the values costs next to nothing: on a CPU, and not while a compiler traces shapes."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
