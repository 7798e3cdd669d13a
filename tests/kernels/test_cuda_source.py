"""The CUDA kernels called directly: by a simulator on the host, on a GPU, and compiled for three architectures."""

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from align.kernels import cuda
from align.kernels.contrast.reference import contrast_logits
from align.kernels.rows.op import METHODS
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


@pytest.fixture
def simulated(simulator: ctypes.CDLL) -> Callable[..., None]:
    """`execute` on the host, with threads in a random order."""

    def run(kernel: str, dtype: torch.dtype, order: int, rows: int, *arguments: object) -> None:
        function = simulator[f"sim_{kernel}_{cuda.SUFFIXES[dtype]}"]
        function(ctypes.c_uint(order), ctypes.c_int64(rows), *(_as_c(a) for a in arguments))

    return run


@pytest.fixture(params=["simulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def execute(request: pytest.FixtureRequest) -> Callable[..., None]:
    """execute(kernel, dtype, order, rows, *arguments): on the host with threads in a random order, or on a GPU."""
    if request.param == "cuda":
        if not (torch.cuda.is_available() and cuda.installed()):
            pytest.skip("no CUDA device, or no cuda-core")
        return _on_gpu
    return request.getfixturevalue("simulated")


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
    for method, plain in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
        out = torch.full((5, width), torch.nan)
        execute("softmax", dtype, width, 5, x, x.stride(0), width, out, METHODS[method])
        torch.testing.assert_close(out.double(), plain(x.double(), -1), rtol=2e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_stablemax(execute: Callable[..., None], width: int, dtype: torch.dtype) -> None:
    """s(x) / sum s(x), s = 1 + x from 0 on and 1 / (1 - x) below; as torch has it for inf and NaN."""
    x = rows(width, dtype)
    out = torch.full((5, width), torch.nan)
    execute("softmax", dtype, width, 5, x, x.stride(0), width, out, METHODS["stablemax"])
    wide = x.double()
    s = torch.where(wide >= 0, 1 + wide, 1 / (1 - wide))
    torch.testing.assert_close(out.double(), s / s.sum(-1, keepdim=True), rtol=2e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_contrast(execute: Callable[..., None], width: int, dtype: torch.dtype) -> None:
    z = rows(width, dtype)[:4]
    pair, alpha = torch.tensor([3, -1, 0, 2]), torch.tensor([0.5, 0.5, 0.0, 2.0])
    out = torch.full((4, width), torch.nan)
    execute("contrast_logits", dtype, 0, 4, z, z.stride(0), width, pair, alpha, -2.5, out)
    torch.testing.assert_close(out, contrast_logits(z, pair, alpha, -2.5), rtol=1e-6, atol=1e-5)


Settings = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
SETTINGS = [(1.0, 0, 1.0, 0.0), (0.7, 0, 0.8, 0.0), (1.3, 7, 1.0, 0.0), (1.0, 40, 0.5, 0.02), (0.0, 5, 0.5, 0.1)]


def draw(
    execute: Callable[..., None],
    x: Tensor,
    settings: Settings,
    seed: Tensor,
    rank: bool = True,
) -> tuple[Tensor, ...]:
    """Token, raw and processed log-prob, entropy and rank of each row by the kernel; a row's position is its number."""
    count = len(x)
    temperature, top_k, top_p, min_p = settings
    heat, nucleus, least = (torch.full((count,), value) for value in (temperature, top_p, min_p))
    given = (heat, torch.full((count,), top_k), nucleus, least, seed, torch.arange(count))
    token, ranks = torch.full((count,), -9), torch.full((count if rank else 0,), -9)
    raw, processed, entropy = (torch.full((count,), torch.nan) for _ in range(3))
    results = (token, raw, processed, entropy, ranks)
    execute("sample", x.dtype, x.shape[1], count, x, x.stride(0), x.shape[1], *given, *results)
    return results


def check_draw(x: Tensor, settings: Settings, u: Tensor, token: Tensor, processed: Tensor) -> None:
    """The token may be drawn and is where the uniform number falls, to rounding; its log-prob is that of the twin."""
    temperature, top_k, top_p, min_p = settings
    heat, nucleus, least = (torch.full((len(x),), value) for value in (temperature, top_p, min_p))
    z = sampling.keep(x, heat, torch.full((len(x),), top_k), nucleus, least)
    at, p = token[:, None], torch.softmax(z, 1)
    above, own = p.cumsum(1).gather(1, at)[:, 0], p.gather(1, at)[:, 0]
    assert (own > 0).all() and (above >= u - 1e-5).all() and (above - own <= u + 1e-5).all()
    expected = torch.log_softmax(z, 1).gather(1, at)[:, 0] * (temperature > 0)
    torch.testing.assert_close(processed.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("width", [1, 37, 1000, 4099])
def test_sample(execute: Callable[..., None], width: int, dtype: torch.dtype, settings: Settings) -> None:
    x, seed = (torch.randn(6, width + 3) * 3).to(dtype)[:, :width], torch.arange(6) * 7919 - 3
    token, raw, processed, entropy, rank = draw(execute, x, settings, seed)
    check_draw(x, settings, sampling.uniform(seed, torch.arange(6)) * (settings[0] > 0), token, processed)
    log_p, at = torch.log_softmax(x.double(), 1), token[:, None]
    torch.testing.assert_close(raw.double(), log_p.gather(1, at)[:, 0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(rank, 1 + (x > x.gather(1, at)).sum(1))
    unranked = draw(execute, x, settings, seed, rank=False)
    assert all(torch.equal(*pair) for pair in zip(unranked[:4], (token, raw, processed, entropy), strict=True))


def seed_of(u: float, position: int) -> int:
    """A seed whose uniform number at this position is u: splitmix64 backwards."""
    x = int(u * 2**53) << 11
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x ^= x >> shift ^ x >> 2 * shift
        x = x * pow(factor, -1, 2**64) % 2**64
    x = (x - 0x9E3779B97F4A7C15) % 2**64 ^ int(sampling._mix(torch.tensor(position))) % 2**64
    return x - 2**64 if x >= 2**63 else x


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.3, 0, 1.0, 0.1), (1.0, 0, 0.9, 0.0)])
def test_draws_at_the_ends_of_segments(execute: Callable[..., None], settings: Settings) -> None:
    """Where the sum of a segment and those of its elements round differently; elements beside the ends are masked."""
    x = torch.randn(512 * 5)
    x[::512] = x[511::512] = -torch.inf
    x[-5:] = -30.0
    heat, least = (torch.tensor([value]) for value in (settings[0], settings[3]))
    z = sampling.keep(x[None], heat, torch.tensor([settings[1]]), torch.tensor([settings[2]]), least)
    ends = torch.softmax(z, 1)[0].cumsum(0)[511::512].tolist()
    u = torch.tensor([0.0, *(end + step for end in ends for step in (-1e-8, -1e-12, 1e-12, 1e-8))])
    u = u.double().clamp(0, 1 - 2**-53)
    seed = torch.tensor([seed_of(one, position) for position, one in enumerate(u.tolist())])
    assert torch.equal(sampling.uniform(seed, torch.arange(len(u))), (u * 2**53).floor() / 2**53)
    rows = x.expand(len(u), -1).contiguous()
    token, _, processed, _, _ = draw(execute, rows, settings, seed)
    check_draw(rows, settings, u, token, processed)


def test_a_segment_of_which_each_element_weighs_less_than_a_unit(execute: Callable[..., None]) -> None:
    """512 times e^-29 are 130 units of the mass, 2^-40, in which the kernel counts; one is 4 elements."""
    x = torch.full((3, 1024), -29.0)
    x[:, 600] = 0
    expected = torch.tensor([0, 128, 400])
    seed = torch.tensor([seed_of(place * math.exp(-29), row) for row, place in enumerate(expected.tolist())])
    token = draw(execute, x, (1.0, 0, 1.0, 0.0), seed)[0]
    assert (token - expected).abs().max() <= 4


def test_min_p_decides_between_neighbouring_floats(execute: Callable[..., None]) -> None:
    """Seven floats about the bound top + T log(min p), which float64 tells apart; each weighs 5 % of the largest."""
    for heat in (0.3, 1.0, 2.9):
        top, least = torch.rand(30) * 20, torch.tensor(0.05).double()
        bound = (top.double() + torch.tensor(heat).double() * least.log()).float().view(torch.int32)
        about = (bound[:, None] + torch.arange(-3, 4, dtype=torch.int32)).view(torch.float32)
        x, seed = torch.cat([top[:, None], about], 1), torch.arange(30)
        token, _, processed, _, _ = draw(execute, x, (heat, 0, 1.0, 0.05), seed)
        check_draw(x, (heat, 0, 1.0, 0.05), sampling.uniform(seed, torch.arange(30)), token, processed)


def test_rows_without_a_distribution(execute: Callable[..., None]) -> None:
    """As by the C kernels: token 0, no log-probability but the 0 of temperature 0."""
    x = torch.randn(3, 1100)
    x[0], x[1, 700], x[2, 9] = -torch.inf, torch.nan, torch.inf
    for settings in ((1.0, 0, 1.0, 0.0), (0.7, 3, 0.5, 0.1), (0.0, 0, 1.0, 0.0)):
        token, raw, processed, entropy, rank = draw(execute, x, settings, torch.arange(3))
        assert token.eq(0).all() and raw.isnan().all() and entropy.isnan().all()
        assert processed.isnan().all() if settings[0] else processed.eq(0).all()
        assert torch.equal(rank, 1 + (x > x[:, :1]).sum(1))


@contextmanager
def loads(simulator: ctypes.CDLL, x: Tensor) -> Iterator[Tensor]:
    """How often the kernels of the body load each element of x."""
    counts = torch.zeros(len(x), x.stride(0), dtype=torch.int64)
    simulator.sim_watch(_as_c(x), _as_c(counts))
    try:
        yield counts[:, : x.shape[1]]
    finally:
        simulator.sim_watch(None, None)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("dtype", "width", "segment"),
    [
        (torch.float32, 37, 512),
        (torch.float32, 5003, 512),
        (torch.float32, 300_001, 1024),  # of more than 512 tiles
        (torch.bfloat16, 5003, 1024),
        (torch.float16, 5000, 1024),
    ],
)
def test_a_row_is_read_once_and_one_segment_of_it_again(
    simulator: ctypes.CDLL,
    simulated: Callable[..., None],
    dtype: torch.dtype,
    width: int,
    segment: int,
    temperature: float,
) -> None:
    """Without filters and rank; rows at odd addresses, so that segments begin before them."""
    settings, seed = (temperature, 0, 1.0, 0.0), torch.arange(3)
    x = (torch.randn(3, width + 3) * 3).to(dtype)[:, :width]
    with loads(simulator, x) as counts:
        token, _, processed, _, _ = draw(simulated, x, settings, seed, rank=False)
    check_draw(x, settings, sampling.uniform(seed, torch.arange(3)), token, processed)
    assert counts.min() >= 1 and counts.max() <= 2
    assert (counts.sum(1) <= width + segment).all() and counts.gather(1, token[:, None]).eq(2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings", [(1.0, 0, 1.0, 0.05), (0.7, 3, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 3, 0.5, 0.01), (0.0, 0, 1.0, 0.0)]
)
def test_filters_and_rank_read_again_only_segments_with_candidates(
    simulator: ctypes.CDLL, simulated: Callable[..., None], dtype: torch.dtype, settings: Settings
) -> None:
    """Three likely tokens among 20,003; by temperature 0 the likeliest alone."""
    x = torch.randn(2, 20003).to(dtype)
    likely = [1500, 9000, 16001]
    x[:, likely] = torch.tensor([20.0, 22.0, 21.0]).to(dtype)
    with loads(simulator, x) as counts:
        token, _, processed, _, rank = draw(simulated, x, settings, torch.arange(2))
    check_draw(x, settings, sampling.uniform(torch.arange(2), torch.arange(2)) * (settings[0] > 0), token, processed)
    assert torch.equal(rank, 1 + (x > x.gather(1, token[:, None])).sum(1))
    place, segment = torch.arange(20003), 2048 // x.itemsize
    candidates = likely if settings[0] else likely[1:2]
    near = torch.stack([(place - one).abs() < segment for one in candidates]).any(0)
    assert counts[:, ~near].eq(1).all() and counts[:, candidates].ge(2).all()


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
