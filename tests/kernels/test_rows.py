"""Softmax and its relatives against float64, torch and their own properties, on every code path."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.kernels import linear_logprobs, log_softmax, logsumexp, native, selective_logprobs, softmax
from align.kernels.rows import reference
from align.kernels.rows.op import selective_logprobs_op, softmax_op
from align.kernels.rows.tile import _torch_gradient, logit_gradient, statistics
from align.kernels.sampling.op import sample_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One element, below and above a vector and a block of each instruction set, not multiples of 8, several segments.
WIDTHS = [1, 7, 16, 37, 129, 1000, 20011]


def rows(width: int, dtype: torch.dtype) -> Tensor:
    """Ordinary, half masked, far from zero, rising (so that the running exponent moves), one huge."""
    torch.manual_seed(width)
    x = torch.randn(5, width) * 6
    x[1, : width // 2] = -torch.inf
    x[2] += 1000
    x[3] += torch.linspace(-300, 300, width)
    x[4, -1] = 1e4
    return x.to(dtype)


def error(value: Tensor, truth: Tensor) -> float:
    same = value.double() == truth  # infinities
    return (value.double() - truth).masked_fill(same, 0).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_no_less_exact_than_torch(isa: str, width: int, dtype: torch.dtype) -> None:
    x = rows(width, dtype)
    wide, truth = x.float(), x.double()
    eps = 4 * torch.finfo(torch.float32).eps
    for ours, plain in ((softmax, torch.softmax), (log_softmax, torch.log_softmax), (logsumexp, torch.logsumexp)):
        expected = plain(truth, -1)
        scale = expected.masked_fill(expected.isinf(), 0).abs().max().item()
        assert error(ours(x), expected) <= error(plain(wide, -1), expected) + eps * max(1, scale), ours.__name__


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_selective_logprobs_near_float64(isa: str, width: int, dtype: torch.dtype) -> None:
    x = rows(width, dtype)[:4]
    targets = torch.tensor([0, width - 1, width // 2, -1])
    got = selective_logprobs(x, targets, temperature=0.7)
    truth = torch.log_softmax(x.double() / 0.7, -1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    plain = torch.log_softmax(x.float() / 0.7, -1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    assert got[3] == 0 and got.dtype == torch.float32
    assert error(got[:3], truth[:3]) <= error(plain[:3], truth[:3]) + 2e-6 * max(1, truth.abs().max())


@pytest.mark.parametrize("width", [8, 37, 1000])
def test_sparse_keeps_the_k_largest(isa: str, width: int) -> None:
    x = rows(width, torch.float32)
    x[0] = 1.5  # ties: the first k stay
    p = softmax(x, method="sparse", k=5)
    torch.testing.assert_close(p.double(), reference.sparse_softmax(x.double(), 5), rtol=1e-5, atol=1e-7)
    assert ((p > 0).sum(-1) <= 5).all() and (p[0, :5] == 0.2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_stablemax_near_float64(isa: str, width: int, dtype: torch.dtype) -> None:
    x = rows(width, dtype)[2:]
    torch.testing.assert_close(
        softmax(x, method="stablemax").double(), reference.stablemax(x.double()), rtol=1e-5, atol=1e-9
    )


def test_rows_of_minus_infinity_and_nan_as_torch(isa: str) -> None:
    x = torch.zeros(3, 300)
    x[0] = -torch.inf
    x[1, 7] = torch.nan
    x[2, 9] = torch.inf
    for ours, plain in ((softmax, torch.softmax), (log_softmax, torch.log_softmax), (logsumexp, torch.logsumexp)):
        got, expected = ours(x)[:2], plain(x, -1)[:2]
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf()), ours.__name__
    assert logsumexp(x)[2] == torch.inf
    assert softmax(x, method="sparse", k=3)[:2].isnan().all()
    got, expected = softmax(x, method="stablemax"), reference.stablemax(x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_no_rows(isa: str) -> None:
    x = torch.empty(0, 11)
    assert softmax(x).shape == (0, 11) and logsumexp(x).shape == (0,)
    assert selective_logprobs(x, torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_streamed_rows_from_any_address(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming stores begin at the first aligned element; a view moves it."""
    monkeypatch.setattr("align.kernels.rows.op.STREAM_BYTES", 0)
    for width, shift in itertools.product((3, 20, 129, 2003), (0, 1, 5)):
        x = torch.randn(2 * width + 3)[3:].view(2, width)
        memory = torch.full((x.numel() + 10,), torch.nan)
        out = memory[shift : shift + x.numel()].view(2, width)
        assert softmax(x, out=out) is out
        torch.testing.assert_close(out.double(), torch.softmax(x.double(), -1), rtol=1e-5, atol=0)
        assert memory[:shift].isnan().all() and memory[shift + x.numel() :].isnan().all()


def test_rows_that_are_not_contiguous(isa: str) -> None:
    x = torch.randn(6, 50)
    for view in (x[::2], x[:, 3:40], x.T):
        torch.testing.assert_close(logsumexp(view), torch.logsumexp(view, -1))
        torch.testing.assert_close(softmax(view), torch.softmax(view, -1))


def test_threads_do_not_change_the_numbers() -> None:
    x = torch.randn(64, 20011)
    one = softmax(x)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(softmax(x), one)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 400), shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_shift_invariant_and_sums_to_one(width: int, shift: float, seed: int) -> None:
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(seed)) * 5
    for name in ("torch", native.instruction_set()):
        with native.forced(name):
            p = softmax(x)
            torch.testing.assert_close(p.sum(-1), torch.ones(2), rtol=1e-6, atol=0)
            torch.testing.assert_close(softmax(x + shift), p, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(logsumexp(x + shift), logsumexp(x) + shift, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["softmax", "log_softmax", "sparse", "stablemax"])
def test_gradients_of_the_formulas(method: str) -> None:
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: softmax_op(x, method, 4), x)


@pytest.mark.parametrize("method", ["softmax", "log_softmax", "sparse", "stablemax"])
def test_float32_gradients_equal_the_reference(isa: str, method: str) -> None:
    x = (torch.randn(3, 700) * 3).requires_grad_()
    wide = x.detach().double().requires_grad_()
    weights = torch.randn(3, 700)
    plain = {
        "softmax": reference.softmax,
        "log_softmax": reference.log_softmax,
        "sparse": lambda x: reference.sparse_softmax(x, 4),
        "stablemax": reference.stablemax,
    }[method]
    (ours,) = torch.autograd.grad((softmax_op(x, method, 4) * weights).sum(), x)
    (truth,) = torch.autograd.grad((plain(wide) * weights).sum(), wide)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selective_gradients(isa: str, dtype: torch.dtype) -> None:
    x = rows(1000, dtype)[[0, 1, 3]].requires_grad_()
    targets = torch.tensor([3, -1, 999])
    wide = x.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad((selective_logprobs(x, targets, temperature=0.7) * 2).sum(), x)
    (truth,) = torch.autograd.grad((reference.selective_logprobs(wide, targets, 0.7) * 2).sum(), wide)
    assert ours.dtype == dtype and ours[1].eq(0).all()
    torch.testing.assert_close(ours.double(), truth, rtol=2 * torch.finfo(dtype).eps + 1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "width", "room"), [(0, 7, 7), (1, 33, 40), (9, 1, 1), (70, 601, 601), (70, 601, 640)]
)
def test_gradients_of_logits_are_dense_rows(isa: str, count: int, width: int, room: int, dtype: torch.dtype) -> None:
    """torch's bf16 product with AMX reads behind a row's end: nothing that is not of the result may stand there."""
    before = torch.get_num_threads()
    for threads in (1, 3):
        z = (torch.randn(count, room) * 3)[:, :width]
        targets, lse = torch.randint(-1, width, (count, 2)), z.double().logsumexp(1)
        a, b, c, g = torch.randn(count), torch.randn(count), torch.randn(count), torch.randn(count, 2)
        wide = [t.double() for t in (a, g, b, c)]
        truth = _torch_gradient(z.double(), targets, lse, *wide[:2], (wide[2], wide[3]), 0.02, 1.5)
        torch.set_num_threads(threads)
        try:
            d = logit_gradient(z, targets, lse, a, g, quadratic=(b, c), cap=0.02, slope=1.5, dtype=dtype)
        finally:
            torch.set_num_threads(before)
        assert d.is_cuda or d.dtype == torch.float32 or d.is_contiguous()
        torch.testing.assert_close(d.double(), truth, rtol=torch.finfo(dtype).eps + 1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_of_logits_are_those_of_float32_rounded(isa: str, dtype: torch.dtype) -> None:
    """Ties to even, of which a million numbers have some, numbers that are too large, and NaN."""
    z, g = torch.randn(500, 2048), torch.zeros(500, 1)
    targets, lse, a = torch.zeros(500, 1, dtype=torch.int64), z.double().logsumexp(1), torch.randn(500) * 1000
    a[:3] = torch.tensor([torch.nan, 1e38, -1e38])
    wide, narrow = (logit_gradient(z.clone(), targets, lse, a, g, dtype=own) for own in (torch.float32, dtype))
    torch.testing.assert_close(narrow, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_registration(device: str) -> None:
    x = rows(37, torch.bfloat16)[:3].requires_grad_()
    targets = torch.tensor([[3], [-1], [30]])
    torch.library.opcheck(selective_logprobs_op, (x, targets, 0.5))
    for method in ("softmax", "log_softmax", "stablemax"):
        torch.library.opcheck(softmax_op, (x, method, 3))


def test_compiles_to_one_graph(device: str) -> None:
    x = torch.randn(4, 50, requires_grad=True)
    targets = torch.tensor([1, 2, -1, 3])

    def loss(x: Tensor) -> Tensor:
        return selective_logprobs(x, targets).sum() + (softmax(x) ** 2).sum() + logsumexp(x).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # C, and torch
def test_targets_that_are_not_there(dtype: torch.dtype) -> None:
    """Read from C they would be memory of others."""
    logits = torch.randn(2, 64, dtype=dtype)
    with pytest.raises(IndexError, match="target 64 is beyond the vocabulary of 64"):
        selective_logprobs(logits, torch.tensor([3, 64]))
    with pytest.raises(IndexError, match="target 99 is beyond the vocabulary of 64"):
        linear_logprobs(torch.randn(2, 8), torch.randn(64, 8), torch.tensor([99, -1]))
    with pytest.raises(ValueError, match=r"targets \[1\] for logits \[2, 64\]"):
        selective_logprobs(logits, torch.tensor([3]))
    with pytest.raises(ValueError, match=r"targets \[3, 2\] for hidden \[2, 8\]"):
        linear_logprobs(torch.randn(2, 8), torch.randn(64, 8), torch.zeros(3, 2, dtype=torch.int64))


def test_sparse_needs_k() -> None:
    with pytest.raises(ValueError, match="there is no method 'sofmax'"):
        softmax(torch.zeros(2, 5), method="sofmax")
    with pytest.raises(ValueError, match="needs k between 1 and 5"):
        softmax(torch.randn(2, 5), method="sparse")


def test_portable_c_runs_where_it_beats_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse softmax, moments and sampling; everything else is faster in torch without vector instructions."""
    called: list[str] = []
    monkeypatch.setattr(native, "instruction_set", lambda: "scalar")
    monkeypatch.setattr(native, "call", lambda name, *_: called.append(name))
    x, targets = torch.randn(2, 50), torch.tensor([[1], [2]])
    for function in (softmax, log_softmax, logsumexp):
        function(x)
    softmax(x, method="stablemax")
    statistics(x, targets, 1.0, moments=False)
    assert called == []
    softmax(x, method="sparse", k=3)
    statistics(x, targets, 1.0, moments=True)
    one, row = torch.ones(2), torch.arange(2)
    sample_op(x, one, row, one, 0 * one, row, row)
    assert called == ["align_softmax", "align_row_statistics", "align_sample"]


def test_a_library_of_another_version_stays_unused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its argument structures would be misread."""
    if native.library is None:
        pytest.skip("no C library was built")
    monkeypatch.setattr(native, "INTERFACE", "align_interface_of_tomorrow")
    assert native._load() is None
    assert "build them in its folder" in caplog.text
