"""The row kernels as a 64-bit Arm runs them: compiled for it, emulated, and called with this process's memory.

`ALIGN_KERNELS_ON=arm pytest tests/kernels` runs the tests so, with gcc-aarch64-linux-gnu and qemu-user of Debian.
"""

import ctypes
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.kernels import native

COMPILE = ["aarch64-linux-gnu-gcc", "-O3", "-fno-math-errno", "-std=gnu11", "-static"]
BYTES = {0: 4, 1: 2, 2: 2}
"""Of an element, by `native.DTYPES`."""


def _matrix(args: Any, rows: int) -> int:
    """Of rows that lie row_bytes apart, up to the last element."""
    return (rows - 1) * args.row_bytes + args.cols * BYTES[args.dtype]


def _each(size: int) -> Callable[[Any, int], int]:
    return lambda args, rows: rows * size


def _targets(size: int) -> Callable[[Any, int], int]:
    return lambda args, rows: rows * args.targets_per_row * size


def _kept(size: int) -> Callable[[Any, int], int]:
    return lambda args, rows: rows * args.keep * size


REGIONS: dict[str, dict[str, Callable[[Any, int], int]]] = {
    "align_row_statistics": {
        "x": _matrix,
        "targets": _targets(8),
        "logprob": _targets(4),
        "logsumexp": _each(8),
        "entropy": _each(4),
        "log_sum_sq": _each(4),
    },
    "align_logit_gradient": {
        "z": lambda args, rows: (rows - 1) * args.row_bytes + args.cols * 4,
        "targets": _targets(8),
        "logsumexp": _each(8),
        "a": _each(4),
        "b": _each(4),
        "c": _each(4),
        "g": _targets(4),
        "scratch": _targets(8),
    },
    "align_softmax": {
        "x": _matrix,
        "out": lambda args, rows: rows * args.cols * 4,
        "kept_value": _kept(4),
        "kept_place": _kept(8),
    },
    "align_sample": {
        "logits": _matrix,
        **dict.fromkeys(("temperature", "top_p", "min_p", "raw", "processed", "entropy"), _each(4)),
        **dict.fromkeys(("top_k", "seed", "position", "token", "rank"), _each(8)),
        "failed": lambda args, rows: 4,
    },
}
"""What the pointers of each kernel's arguments lead to, in bytes."""


class Arm:
    """Stands for the C library; what its kernels write is here when a call returns."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        program = Path(self.folder.name, "on_arm")
        source = Path(__file__).with_suffix(".c")
        subprocess.run([*COMPILE, source, "-o", program, "-lm", "-lpthread"], check=True)
        self.process = subprocess.Popen(
            ["qemu-aarch64", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=2**20
        )

    def align_isa(self) -> int:
        return native.ARM_LEVELS.index("neon")

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in REGIONS:
            raise AttributeError(name)
        return lambda args, rows, isa, threads: self._run(name, args._obj, rows.value, isa, threads)

    def _run(self, name: str, args: ctypes.Structure, rows: int, isa: int, threads: int) -> None:
        places = {}
        for field, size in REGIONS[name].items():
            if address := ctypes.cast(getattr(args, field), ctypes.c_void_p).value:
                places[field] = (address, size(args, rows))
        given = bytes(args)
        request = [struct.pack("=4i2q", list(REGIONS).index(name), isa, threads, len(places), rows, len(given)), given]
        for field, (address, size) in places.items():
            request.append(struct.pack("=3q", getattr(type(args), field).offset, size, address % 64))
            request.append(ctypes.string_at(address, size))
        self.process.stdin.write(b"".join(request))
        self.process.stdin.flush()
        for address, size in places.values():
            ctypes.memmove(address, self.process.stdout.read(size), size)


def install() -> None:
    """From here on the kernels of this process are those of an Arm."""
    native.LEVELS, native.library = native.ARM_LEVELS, Arm()
