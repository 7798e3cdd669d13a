"""The CUDA C++ kernels: compiled by NVRTC at first use, kept on disk, launched through cuda.core.

No nvcc and no build are needed, only the `cuda` extra. A cubin is kept per source, dtype, architecture and compiler
version in $ALIGN_CACHE (by default ~/.cache/align), seconds of work each. Without cuda.core, or on an AMD device, torch
does the work.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parents[1]
PROGRAMS = {"rows": "rows/rows.cu", "sampling": "sampling/sampling.cu", "contrast": "contrast/contrast.cu"}
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
THREADS = 256


@functools.cache
def installed() -> bool:
    """Whether cuda.core can be imported and torch was built for CUDA."""
    return torch.version.cuda is not None and importlib.util.find_spec("cuda.core") is not None


def usable(x: Tensor) -> bool:
    """Whether the kernels read this tensor: on a CUDA device, of a known dtype, rows contiguous."""
    return x.is_cuda and x.dtype in SUFFIXES and (x.stride(-1) == 1 or x.shape[-1] == 1) and installed()


def source(program: str, suffixes: tuple[str, ...]) -> str:
    """A program's text for some dtypes, with its one include written out, so that it compiles from memory."""
    text = (SOURCES / PROGRAMS[program]).read_text()
    text = text.replace('#include "../cuda/device.cuh"', (SOURCES / "cuda/device.cuh").read_text())
    return text + "".join(f"KERNELS({suffix})\n" for suffix in suffixes)


def compile_cubin(program: str, suffix: str, architecture: str) -> bytes:
    """Machine code for one dtype and one architecture such as "sm_90a", from the cache or from NVRTC; needs no GPU."""
    from cuda.core import Program, ProgramOptions
    from cuda.core import __version__ as compiler

    text = source(program, (suffix,))
    key = hashlib.sha256(f"{compiler}\n{architecture}\n{text}".encode()).hexdigest()[:32]
    folder = Path(os.environ.get("ALIGN_CACHE", Path.home() / ".cache/align")) / "cubin"
    kept = folder / f"{program}-{suffix}-{architecture}-{key}.cubin"
    if not kept.exists():
        options = ProgramOptions(std="c++17", arch=architecture, ftz=True)
        code = Program(text, code_type="c++", options=options).compile("cubin").code
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_bytes(code)
        partial.replace(kept)  # another process sees all of it or nothing
    return kept.read_bytes()


@functools.cache
def _kernel(program: str, name: str, suffix: str, device: int) -> object:
    from cuda.core import ObjectCode

    major, minor = torch.cuda.get_device_capability(device)
    specific = "a" if major >= 9 else ""
    code = compile_cubin(program, suffix, f"sm_{major}{minor}{specific}")
    return ObjectCode.from_cubin(code).get_kernel(f"{name}_{suffix}")


def _argument(value: object) -> object:
    """Addresses and integers are 64 bits wide in every kernel, floats 32."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return ctypes.c_float(value) if isinstance(value, float) else value


def launch(program: str, kernel: str, dtype: torch.dtype, rows: int, *arguments: object) -> None:
    """Run a kernel for one of the dtypes of `SUFFIXES` on torch's current stream, one block per row."""
    from cuda.core import Device, LaunchConfig, Stream
    from cuda.core import launch as start

    if rows == 0:
        return
    tensor = next(a for a in arguments if isinstance(a, Tensor))
    index = tensor.device.index
    with torch.cuda.device(index):
        Device(index).set_current()
        stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        raw = [_argument(a) for a in arguments]
        function = _kernel(program, kernel, SUFFIXES[dtype], index)
        start(stream, LaunchConfig(grid=rows, block=THREADS), function, *raw)
