"""The CPU kernels in C: found beside this file once built, called through ctypes on torch's memory.

Without them (no compiler at installation) every caller takes its torch path; `instruction_set()` says which is in use.
ALIGN_KERNELS_ISA=torch|scalar|avx2|avx512|avx512_bf16|amx_bf16, on Arm torch|scalar|neon, forces one, for tests and
comparisons.
"""

import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

X86_LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")
ARM_LEVELS = ("scalar", "neon")
LEVELS = ARM_LEVELS if platform.machine() in ("aarch64", "arm64") else X86_LEVELS
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INTERFACE = "align_interface_4"
"""A symbol of the C library; its number goes up with every change of an argument or of what a kernel does."""
ELEMENTS_PER_THREAD = 2**18
_forced = os.environ.get("ALIGN_KERNELS_ISA")


def _load() -> ctypes.CDLL | None:
    """The first library beside this file that was built from these sources; one of before an update would misread."""
    found = [ctypes.CDLL(str(path)) for path in sorted(Path(__file__).parent.glob("_kernels*.so"))]
    fitting = [library for library in found if hasattr(library, INTERFACE)]
    if found and not fitting:
        logging.getLogger("align").warning(
            "the C kernels are of an earlier version and stay unused; install Align again, or build them in its folder "
            "with `python setup.py build_ext --inplace`"
        )
    return fitting[0] if fitting else None


library = _load()


def instruction_set() -> str:
    """Which code runs: "torch" where no C library was built, else one of `LEVELS`."""
    if library is None or _forced == "torch":
        return "torch"
    best = library.align_isa()
    return LEVELS[best if _forced is None else min(best, LEVELS.index(_forced))]


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Run the body with one instruction set (or "torch"); one this machine lacks falls back to its best."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def usable(x: Tensor, scalar_wins: bool = False) -> bool:
    """Whether to give the C kernels this tensor: on the CPU, of a known dtype, rows contiguous.

    Args:
        x: the tensor.
        scalar_wins: portable C beats torch's vectors here; elsewhere it runs only where forced.
    """
    known = x.device.type == "cpu" and x.dtype in DTYPES and (x.stride(-1) == 1 or x.shape[-1] == 1)
    if not known:
        return False
    level = instruction_set()
    return level != "torch" and (level != "scalar" or scalar_wins or _forced == "scalar")


def call(name: str, args: ctypes.Structure, rows: int, elements: int) -> None:
    """Run a row kernel over `rows` rows, on as many of torch's threads as the work is worth."""
    threads = min(torch.get_num_threads(), max(1, elements // ELEMENTS_PER_THREAD))
    getattr(library, name)(ctypes.byref(args), ctypes.c_int64(rows), LEVELS.index(instruction_set()), threads)


def linear_bf16(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """out [C, V] = x [C, H] weight [V, H]' from bf16 with float32 sums; False, and nothing done, where it cannot."""
    fits = x.dtype == weight.dtype == torch.bfloat16 and usable(x) and usable(weight)
    if library is None or not fits or instruction_set() not in ("avx512_bf16", "amx_bf16"):
        return False
    strides = (x.stride(0), weight.stride(0), out.stride(0))
    args = LinearBf16Args(*(t.data_ptr() for t in (x, weight, out)), *x.shape, weight.shape[0], *strides)
    return bool(library.align_linear_bf16(ctypes.byref(args), LEVELS.index(instruction_set()), torch.get_num_threads()))


def pointer(tensor: Tensor | None) -> int | None:
    """A tensor's address as ctypes takes it; NULL for None."""
    return None if tensor is None else tensor.data_ptr()


class RowStatisticsArgs(ctypes.Structure):
    """row_statistics_args of scalar.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("cols", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("targets_per_row", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("logprob", ctypes.c_void_p),
        ("logsumexp", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("log_sum_sq", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
    ]


class LogitGradientArgs(ctypes.Structure):
    """logit_gradient_args of scalar.h."""

    _fields_ = [
        ("z", ctypes.c_void_p),
        ("cols", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("out_row_bytes", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("targets_per_row", ctypes.c_int64),
        ("logsumexp", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("cap", ctypes.c_float),
        ("slope", ctypes.c_float),
        ("dtype", ctypes.c_int),
    ]


class SoftmaxArgs(ctypes.Structure):
    """softmax_args of scalar.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("cols", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("keep", ctypes.c_int64),
        ("kept_value", ctypes.c_void_p),
        ("kept_place", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("method", ctypes.c_int),
        ("stream", ctypes.c_int),
    ]


class SampleArgs(ctypes.Structure):
    """sample_args of scalar.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("cols", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("temperature", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("min_p", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("seed", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("token", ctypes.c_void_p),
        ("rank", ctypes.c_void_p),
        ("raw", ctypes.c_void_p),
        ("processed", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("failed", ctypes.POINTER(ctypes.c_int)),
        ("dtype", ctypes.c_int),
    ]


class LinearBf16Args(ctypes.Structure):
    """linear_bf16_args of scalar.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("w_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
    ]
