"""The CUDA kernels called directly: by a simulator on the host, on a GPU, and compiled for three architectures."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from align.kernels import cuda
from align.kernels.contrast.reference import contrast_logits
from align.kernels.rows.tile import _torch_gradient, _torch_statistics
from align.kernels.sampling import reference as sampling

WIDTHS = [1, 5, 37, 1000, 4099]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the simulator with")
    library = tmp_path_factory.mktemp("simulator") / "simulator.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{cuda.SOURCES}", f"-I{HERE / 'simulator'}"]
    subprocess.run([compiler, *options, "-o", library, HERE / "simulator/simulator.cpp"], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(params=["simulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def execute(request: pytest.FixtureRequest) -> Callable[..., None]:
    """execute(kernel, dtype, order, rows, *arguments): on the host with threads in a random order, or on a GPU."""
    if request.param == "cuda":
        if not (torch.cuda.is_available() and cuda.installed()):
            pytest.skip("no CUDA device, or no cuda-core")
        return _on_gpu
    loaded = request.getfixturevalue("simulator")

    def run(kernel: str, dtype: torch.dtype, order: int, rows: int, *arguments: object) -> None:
        function = loaded[f"sim_{kernel}_{cuda.SUFFIXES[dtype]}"]
        function(ctypes.c_uint(order), ctypes.c_int64(rows), *(_as_c(a) for a in arguments))

    return run


def _on_gpu(kernel: str, dtype: torch.dtype, order: int, rows: int, *arguments: object) -> None:
    program = {"sample": "sampling", "contrast_logits": "contrast"}.get(kernel, "rows")
    there = [_copy(a) if isinstance(a, Tensor) else a for a in arguments]
    cuda.launch(program, kernel, dtype, rows, *there)
    for here, result in zip(arguments, there, strict=True):
        if isinstance(here, Tensor):
            here.copy_(result)  # type: ignore[arg-type]


def _copy(tensor: Tensor) -> Tensor:
    """On the GPU with the same strides, in memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)


def _as_c(value: object) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)  # type: ignore[arg-type]


def rows(width: int, dtype: torch.dtype) -> Tensor:
    """Ordinary, half masked, huge, rising, all -inf; at an odd stride, so that rows are not aligned."""
    x = torch.randn(5, width + 3) * 6
    x[1, : width // 2] = -torch.inf
    x[2] += 1e4
    x[3] += torch.linspace(-300, 300, width + 3)
    x[4] = -torch.inf
    return x.to(dtype)[:, :width]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_row_statistics(execute: Callable[..., None], width: int, dtype: torch.dtype) -> None:
    x = rows(width, dtype)
    targets = torch.tensor([[0, -1], [width - 1, width - 1], [width // 2, 0], [width - 1, 0], [0, 0]])
    logprob, lse = torch.full((5, 2), torch.nan), torch.full((5,), torch.nan, dtype=torch.float64)
    entropy, squares = torch.full((5,), torch.nan), torch.full((5,), torch.nan)
    given = (x, x.stride(0), width, 0.7, targets, 2, logprob, lse, entropy, squares, 1)
    execute("row_statistics", dtype, width, 5, *given)
    truth = _torch_statistics(x.double(), targets, 0.7, True)
    for value, expected in ((logprob, truth.logprob), (lse, truth.logsumexp)):
        torch.testing.assert_close(value.double(), expected, rtol=2e-7, atol=2e-5, equal_nan=True)
    torch.testing.assert_close(entropy[:4].double(), truth.entropy[:4], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(squares[:4].double(), truth.log_sum_sq[:4], rtol=1e-4, atol=2e-5)
    assert lse[4] == -torch.inf and entropy[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 2048])
@pytest.mark.parametrize("quadratic", [False, True])
def test_logit_gradient(execute: Callable[..., None], width: int, dtype: torch.dtype, quadratic: bool) -> None:
    z = torch.randn(3, width + 3) * 4
    truth_z = z[:, :width].double()
    lse = truth_z.logsumexp(1)
    a, b, c, g = torch.randn(3), torch.randn(3), torch.randn(3), torch.randn(3, 2)
    targets = torch.tensor([[0, -1], [width - 1, width - 1], [-1, width // 2]])
    given = (z, z.stride(0), width, targets, 2, lse, a, b, c, g, 0.02, 1.5, int(quadratic))
    execute("logit_gradient", dtype, width, 3, *given)
    bc = (b.double(), c.double()) if quadratic else None
    truth = _torch_gradient(truth_z, targets, lse, a.double(), g.double(), bc, 0.02, 1.5)
    got = z.view(dtype)[:, :width].double()
    torch.testing.assert_close(got, truth, rtol=torch.finfo(dtype).eps + 1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_softmax(execute: Callable[..., None], width: int, dtype: torch.dtype) -> None:
    x = rows(width, dtype)
    for log_space, plain in ((0, torch.softmax), (1, torch.log_softmax)):
        out = torch.full((5, width), torch.nan)
        execute("softmax", dtype, width, 5, x, x.stride(0), width, out, log_space)
        torch.testing.assert_close(out.double(), plain(x.double(), -1), rtol=2e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_contrast(execute: Callable[..., None], width: int, dtype: torch.dtype) -> None:
    z = rows(width, dtype)[:4]
    pair, alpha = torch.tensor([3, -1, 0, 2]), torch.tensor([0.5, 0.5, 0.0, 2.0])
    out = torch.full((4, width), torch.nan)
    execute("contrast_logits", dtype, 0, 4, z, z.stride(0), width, pair, alpha, -2.5, out)
    torch.testing.assert_close(out, contrast_logits(z, pair, alpha, -2.5), rtol=1e-6, atol=1e-5)


SETTINGS = [(1.0, 0, 1.0, 0.0), (0.7, 0, 0.8, 0.0), (1.3, 7, 1.0, 0.0), (1.0, 40, 0.5, 0.02), (0.0, 5, 0.5, 0.1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
@pytest.mark.parametrize("width", [1, 37, 1000, 4099])
def test_sample(
    execute: Callable[..., None],
    width: int,
    dtype: torch.dtype,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    """The kernel's token is where the twin's uniform number falls, to rounding; its statistics are the token's."""
    x = (torch.randn(6, width + 3) * 3).to(dtype)[:, :width]
    heat, nucleus, least = (torch.full((6,), value) for value in (temperature, top_p, min_p))
    count, seed, position = torch.full((6,), top_k), torch.arange(6) * 7919 - 3, torch.arange(6)
    token, rank = torch.full((6,), -9), torch.full((6,), -9)
    raw, processed, entropy = (torch.full((6,), torch.nan) for _ in range(3))
    given = (x, x.stride(0), width, heat, count, nucleus, least, seed, position)
    execute("sample", dtype, width, 6, *given, token, raw, processed, entropy, rank)
    z = sampling.keep(x, heat, count, nucleus, least)
    cdf = torch.softmax(z, 1).cumsum(1)
    u = sampling.uniform(seed, position) * (temperature > 0)
    at = token[:, None]
    above = cdf.gather(1, at)[:, 0]
    assert (above >= u - 1e-5).all() and (above - torch.softmax(z, 1).gather(1, at)[:, 0] <= u + 1e-5).all()
    expected = torch.log_softmax(z, 1).gather(1, at)[:, 0] * (temperature > 0)
    torch.testing.assert_close(processed.double(), expected, rtol=1e-5, atol=2e-5)
    log_p = torch.log_softmax(x.double(), 1)
    torch.testing.assert_close(raw.double(), log_p.gather(1, at)[:, 0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(rank, 1 + (x > x.gather(1, at)).sum(1))


def test_no_thread_order_changes_a_bit(execute: Callable[..., None]) -> None:
    x = torch.randn(2, 1003)
    results = []
    for order in range(4):
        lse, token = torch.empty(2, dtype=torch.float64), torch.empty(2, dtype=torch.int64)
        floats = [torch.empty(2) for _ in range(5)]
        none = torch.empty(2, 0, dtype=torch.int64)
        execute("row_statistics", x.dtype, order, 2, x, 1003, 1003, 1.0, none, 0, floats[0], lse, *floats[1:3], 1)
        number, one = torch.arange(2), torch.ones(2)
        tail = (token, *floats[:2], floats[3], torch.empty(2, dtype=torch.int64))
        given = (one, number + 9, one * 0.9, one * 0, number, number, *tail)
        execute("sample", x.dtype, order, 2, x, 1003, 1003, *given)
        results.append(torch.cat([lse, token.double(), *(f.double() for f in floats[:4])]))
    assert all(torch.equal(r.nan_to_num(7), results[0].nan_to_num(7)) for r in results)


ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("program", sorted(cuda.PROGRAMS))
def test_compiles_without_spills(program: str, architecture: str, tmp_path: Path) -> None:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("no nvcc on this machine")
    text = tmp_path / "program.cu"
    text.write_text(cuda.source(program, tuple(cuda.SUFFIXES.values())))
    options = ["-std=c++17", "-ftz=true", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "cubin"]
    done = subprocess.run([compiler, *options, text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = [line.strip() for line in done.stderr.splitlines() if "bytes spill stores" in line]
    assert len(usage) == 3 * text.read_text().count('extern "C"')
    assert set(usage) == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("program", sorted(cuda.PROGRAMS))
def test_nvrtc_compiles_once(program: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = pytest.importorskip("cuda.core", reason="no cuda-core to compile with")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    code = cuda.compile_cubin(program, "bf16", architecture)
    assert code.startswith(b"\x7fELF") and b"_bf16" in code and b"_f16" not in code.replace(b"_bf16", b"")
    monkeypatch.setattr(core, "Program", None)  # not called again
    assert cuda.compile_cubin(program, "bf16", architecture) == code
