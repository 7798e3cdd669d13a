"""Any shape, stride and dtype through every kernel, against float64 torch; and what each of them refuses."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.kernels import (
    contrast_logits,
    linear_logprobs,
    log_softmax,
    logsumexp,
    native,
    sample,
    selective_logprobs,
    softmax,
)
from align.kernels.rows.tile import _torch_gradient, logit_gradient, statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PATHS = [*dict.fromkeys(["torch", *native.LEVELS[:2], native.instruction_set()])]
SIZES = st.sampled_from([0, 1, 2, 3, 5, 31, 32, 33, 64, 129])
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def matrices(draw, rows=SIZES, columns=SIZES, dtype=None) -> Tensor:
    """[rows, columns] as a view of larger memory that is NaN around it, in every kind of stride."""
    n, m = draw(rows), draw(columns)
    kind = draw(st.sampled_from(["dense", "sliced", "strided", "transposed", "every other", "expanded"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    values = (torch.randn(n, m, generator=generator) * 4).to(dtype or draw(st.sampled_from(DTYPES)))
    if kind == "expanded":
        return values[:1].expand(n, m) if n else values
    if kind == "transposed":
        return values.T.contiguous().T
    if kind in ("dense", "every other"):
        around = torch.full((2 * n + 1, m), torch.nan, dtype=values.dtype)
        view = around[1::2] if kind == "every other" else around[1 : n + 1]
        return view.copy_(values)
    around = torch.full((n + 2, 2 * m + 5), torch.nan, dtype=values.dtype)
    view = around[1 : n + 1, 3 : m + 3] if kind == "sliced" else around[1 : n + 1, 1 : 2 * m + 1 : 2]
    return view.copy_(values)


def close(got: Tensor, truth: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
    """Within a few roundings of the dtype it was computed in."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), truth, rtol=8 * eps, atol=max(64 * eps * scale, 1e-12), equal_nan=True)


@pytest.mark.parametrize("path", PATHS)
@fuzz
@given(x=matrices())
def test_row_kernels(path: str, x: Tensor) -> None:
    wide, result = x.double(), torch.float64 if x.dtype == torch.float64 else torch.float32
    with native.forced(path):
        for ours, plain in ((softmax, torch.softmax), (log_softmax, torch.log_softmax), (logsumexp, torch.logsumexp)):
            got = ours(x)
            assert got.dtype == result and got.shape == plain(wide, -1).shape
            close(got, plain(wide, -1), result, 4)
        out = torch.full(x.shape, torch.nan, dtype=result)
        assert softmax(x, out=out) is out
        close(out, torch.softmax(wide, -1), result)


@pytest.mark.parametrize("path", PATHS)
@fuzz
@given(x=matrices(), data=st.data())
def test_selective_logprobs(path: str, x: Tensor, data: st.DataObject) -> None:
    low = -1 if x.shape[1] else -3
    ids = data.draw(
        st.lists(st.integers(low, max(x.shape[1], 1) - 1 if x.shape[1] else -1), min_size=len(x), max_size=len(x))
    )
    kind = data.draw(st.sampled_from([torch.int64, torch.int32]))
    targets = torch.tensor(ids, dtype=kind)
    leaf = x.detach().requires_grad_()
    wide = x.double().requires_grad_()
    if x.shape[1]:
        truth = torch.log_softmax(wide / 0.7, -1).gather(1, targets.long().clamp_min(0)[:, None])[:, 0]
        truth = truth.masked_fill(targets < 0, 0)
    else:
        truth = wide.sum(1)
    with native.forced(path):
        got = selective_logprobs(leaf, targets, temperature=0.7)
        (gradient,) = torch.autograd.grad((got * 3).sum(), leaf)
    (expected,) = torch.autograd.grad((truth * 3).sum(), wide)
    close(got.detach(), truth.detach(), torch.float64 if x.dtype == torch.float64 else torch.float32, 8)
    close(gradient, expected, x.dtype, 4)


@pytest.mark.parametrize("path", PATHS)
@fuzz
@given(x=matrices(columns=SIZES.filter(bool)), data=st.data())
def test_statistics(path: str, x: Tensor, data: st.DataObject) -> None:
    columns = data.draw(st.integers(0, 3))
    targets = torch.randint(-1, x.shape[1], (len(x), 2 * columns + 1))[:, :columns]  # not contiguous
    with native.forced(path):
        got = statistics(x, targets, 0.7, moments=True)
    log_p = torch.log_softmax(0.7 * x.double(), -1)
    close(got.logprob, log_p.gather(1, targets.clamp_min(0)).masked_fill(targets < 0, 0), scale=8)
    close(got.logsumexp, torch.logsumexp(0.7 * x.double(), -1), scale=8)
    close(got.entropy, -(log_p.exp() * log_p).sum(-1), scale=8)
    close(got.log_sum_sq, (2 * log_p).logsumexp(-1), scale=8)


@pytest.mark.parametrize("path", PATHS)
@fuzz
@given(z=matrices(dtype=torch.float32), dtype=st.sampled_from(DTYPES), quadratic=st.booleans())
def test_logit_gradient(path: str, z: Tensor, dtype: torch.dtype, quadratic: bool) -> None:
    z = z.clone() if len(z) > 1 and z.stride(0) == 0 else z  # it is written over
    n, m = z.shape
    targets, lse = torch.randint(-1, max(m, 1), (n, 2)) if m else torch.full((n, 2), -1), z.double().logsumexp(1)
    a, b, c, g = torch.randn(n), torch.randn(n), torch.randn(n), torch.randn(n, 2)
    wide = (b.double(), c.double()) if quadratic else None
    given_wide = (targets, lse, a.double(), g.double(), wide, 0.01, 1.5)
    truth = _torch_gradient(z.double(), *given_wide) if m else z.double()
    with native.forced(path):
        d = logit_gradient(
            z, targets, lse, a, g, quadratic=(b, c) if quadratic else None, cap=0.01, slope=1.5, dtype=dtype
        )
    assert d.dtype == dtype and d.shape == z.shape
    assert d.is_contiguous() or dtype.itemsize > 2
    close(d, truth, dtype if dtype.itemsize < 4 else torch.float32, 16)


@pytest.mark.parametrize("path", PATHS)
@fuzz
@given(data=st.data())
def test_linear_logprobs(path: str, data: st.DataObject) -> None:
    """Value and gradient of hidden states, weight strided or not, at widths that no vector divides."""
    dtype = data.draw(st.sampled_from(DTYPES))
    width, vocabulary = data.draw(SIZES.filter(bool)), data.draw(SIZES.filter(bool))
    hidden = data.draw(matrices(columns=st.just(width), dtype=dtype)) / 4
    weight = data.draw(matrices(rows=st.just(vocabulary), columns=st.just(width), dtype=dtype))
    targets = torch.randint(-1, vocabulary, (len(hidden),))
    mode, chunk = (
        data.draw(st.sampled_from(["direction", "recompute", "store"])),
        data.draw(st.sampled_from([1, 4, 99])),
    )
    leaf, wide = hidden.detach().requires_grad_(), hidden.detach().double().requires_grad_()
    with native.forced(path):
        got = linear_logprobs(leaf, weight, targets, grad=mode, chunk_rows=chunk).logprob
        (gradient,) = torch.autograd.grad((got * 2).sum(), leaf)
    log_p = torch.log_softmax(wide @ weight.double().T, -1)
    truth = log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0].masked_fill(targets < 0, 0)
    (expected,) = torch.autograd.grad((truth * 2).sum(), wide)
    close(got.detach(), truth.detach(), torch.float64 if dtype == torch.float64 else torch.float32, 64)
    assert gradient.isfinite().all()
    largest = (wide @ weight.double().T).abs().max().item() if len(wide) else 0.0  # its rounding is that of p
    close(gradient, expected, dtype, 1 + largest)


@pytest.mark.parametrize("path", PATHS)
@fuzz
@given(x=matrices(columns=SIZES.filter(bool)), data=st.data())
def test_sample_and_contrast(path: str, x: Tensor, data: st.DataObject) -> None:
    """A view's draws are those of its copy, and the log-probability is the token's."""
    options = {"temperature": data.draw(st.sampled_from([0.0, 0.8])), "top_k": data.draw(st.sampled_from([0, 2, 500]))}
    options |= {"top_p": data.draw(st.sampled_from([1.0, 0.6])), "min_p": data.draw(st.sampled_from([0.0, 0.1]))}
    options |= {"seed": torch.arange(2 * len(x))[::2], "position": 3}
    with native.forced(path):
        drawn, copied = (sample(own, **options) for own in (x, x.clone(memory_format=torch.contiguous_format)))
        contrast = contrast_logits(x, torch.arange(len(x)) - 1, 0.5, mask_tau=0.2)
    assert torch.equal(drawn.token, copied.token) and torch.equal(drawn.rank, copied.rank)
    log_p = torch.log_softmax(x.double(), -1)
    close(drawn.raw_logprob, log_p.gather(1, drawn.token[:, None])[:, 0], scale=8)
    close(drawn.entropy, -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1), scale=16)
    z = x.float()
    plausible = z >= z.amax(1, keepdim=True) + math.log(0.2)
    pair = z.roll(1, 0) if len(z) else z
    expected = (1.5 * z - 0.5 * pair).masked_fill(~plausible, -torch.inf)
    if len(z):
        expected[0] = z[0]
    torch.testing.assert_close(contrast, expected, rtol=1e-6, atol=1e-5)


LOGITS, HIDDEN, WEIGHT, IDS = torch.randn(3, 5), torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
REFUSED = [
    (softmax, (torch.ones(3, 5, dtype=torch.int64),), {}, "softmax: x is torch.int64"),
    (softmax, (torch.tensor(1.0),), {}, r"softmax: x is torch.float32 \[\]"),
    (softmax, (LOGITS,), {"out": torch.empty(5, 3)}, r"softmax: out is torch.float32 \[5, 3\]; give contiguous floats"),
    (softmax, (LOGITS,), {"out": torch.empty(5, 3).T}, "softmax: out is"),
    (softmax, (LOGITS,), {"out": torch.empty(3, 5, dtype=torch.int32)}, "softmax: out is torch.int32"),
    (softmax, (LOGITS,), {"method": "sparse", "k": 6}, "needs k between 1 and 5, got 6"),
    (log_softmax, (torch.ones(3, 5, dtype=torch.bool),), {}, "log_softmax: x is torch.bool"),
    (logsumexp, (torch.ones(3, 5, dtype=torch.int32),), {}, "logsumexp: x is torch.int32"),
    (selective_logprobs, (LOGITS, IDS.float()), {}, r"selective_logprobs: targets \[3\] are torch.float32; give whole"),
    (selective_logprobs, (LOGITS, IDS[:2]), {}, r"targets \[2\] for logits \[3, 5\]"),
    (selective_logprobs, (LOGITS, IDS), {"temperature": 0.0}, "selective_logprobs: temperature is 0; give a finite"),
    (selective_logprobs, (LOGITS, IDS), {"temperature": -1.0}, "temperature is -1"),
    (selective_logprobs, (LOGITS, IDS), {"temperature": math.nan}, "temperature is nan"),
    (selective_logprobs, (LOGITS, IDS + 3), {}, r"target 5 is beyond .* of 5 \(the first such is in row 2\)"),
    (linear_logprobs, (HIDDEN, WEIGHT[:, :3], IDS), {}, r"hidden is \[3, 4\]; weight \[5, 3\] goes with"),
    (linear_logprobs, (HIDDEN.bfloat16(), torch.randn(5, 9).bfloat16(), IDS), {}, r"hidden is \[3, 4\]"),
    (linear_logprobs, (HIDDEN.long(), WEIGHT, IDS), {}, "linear_logprobs: hidden is torch.int64"),
    (linear_logprobs, (HIDDEN, WEIGHT, IDS.double()), {}, "linear_logprobs: targets .* give whole numbers"),
    (linear_logprobs, (HIDDEN, WEIGHT, IDS[:1]), {}, r"targets \[1\] for hidden \[3, 4\]"),
    (linear_logprobs, (HIDDEN, WEIGHT, IDS + 9), {}, "target 11 is beyond the vocabulary of 5"),
    (linear_logprobs, (HIDDEN, WEIGHT, IDS), {"bias": torch.randn(1)}, r"linear_logprobs: bias is \[1\]"),
    (linear_logprobs, (HIDDEN, WEIGHT, IDS), {"temperature": 0.0}, "linear_logprobs: temperature is 0"),
    (linear_logprobs, (HIDDEN, WEIGHT, IDS), {"softcap": -1.0}, "linear_logprobs: softcap is -1"),
    (linear_logprobs, (HIDDEN, WEIGHT, IDS), {"chunk_rows": 0}, "linear_logprobs: chunk_rows is 0"),
    (linear_logprobs, (HIDDEN, WEIGHT, IDS), {"lora": (torch.randn(2, 4), torch.randn(5, 3), 1.0)}, "lora B is"),
    (linear_logprobs, (HIDDEN, WEIGHT, IDS), {"outputs": ("logit",)}, r"unknown outputs \['logit'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "options", "message"), REFUSED)
@pytest.mark.parametrize("path", ["torch", native.instruction_set()])
def test_what_is_refused(path, function, arguments, options, message) -> None:
    with native.forced(path), pytest.raises((ValueError, IndexError), match=message):
        function(*arguments, **options)
