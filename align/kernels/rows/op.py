"""The row operators as torch knows them, with their autograd; float32 results whatever the input's dtype."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from align.kernels import cuda, native
from align.kernels.registration import register
from align.kernels.rows import reference
from align.kernels.rows.tile import logit_gradient, statistics

METHODS = {"softmax": 0, "log_softmax": 1, "sparse": 2, "stablemax": 3, "three_pass": 4}
ON_CUDA = ("softmax", "log_softmax", "stablemax")
STREAM_BYTES = 2**25
BACKWARD_BYTES = 2**26


def softmax_into(x: Float[Tensor, "R V"], method: str, k: int, out: Float[Tensor, "R V"]) -> None:
    """Write one of the methods for every row; past the caches when the result is larger than most CPUs' caches."""
    fits = native.usable(x, scalar_wins=method == "sparse") and out.dtype == torch.float32 and out.is_contiguous()
    rows, cols = x.shape
    if cuda.usable(x) and out.dtype == torch.float32 and out.is_contiguous() and method in ON_CUDA:
        given = (x, x.stride(0), cols, out, METHODS[method])
        cuda.launch("rows", "softmax", x.dtype, rows, *given)
        return
    if not fits:
        out.copy_(_REFERENCE[method](x, k))
        return
    keep = k if method == "sparse" else 0
    values, places = torch.empty(rows, keep), torch.empty(rows, keep, dtype=torch.int64)
    args = native.SoftmaxArgs(
        x=x.data_ptr(),
        out=out.data_ptr(),
        cols=cols,
        row_bytes=x.stride(0) * x.element_size(),
        keep=keep,
        kept_value=values.data_ptr(),
        kept_place=places.data_ptr(),
        dtype=native.DTYPES[x.dtype],
        method=METHODS[method],
        stream=int(out.numel() * 4 > STREAM_BYTES),
    )
    native.call("align_softmax", args, rows, x.numel())


_REFERENCE = {
    "softmax": lambda x, k: reference.softmax(x),
    "log_softmax": lambda x, k: reference.log_softmax(x),
    "sparse": lambda x, k: reference.sparse_softmax(x, k),
    "stablemax": lambda x, k: reference.stablemax(x),
}


def result_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _softmax(x: Tensor, method: str, k: int) -> Tensor:
    """Any of the methods over the rows of x [R, V]."""
    out = torch.empty_like(x, dtype=result_dtype(x), memory_format=torch.contiguous_format)
    softmax_into(x, method, k, out)
    return out


def _softmax_fake(x: Tensor, method: str, k: int) -> Tensor:
    return torch.empty_like(x, dtype=result_dtype(x), memory_format=torch.contiguous_format)


def _softmax_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.method, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output, x if ctx.method == "stablemax" else None)


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """Softmax: p (g - sum g p), log-softmax: g - p sum g, stablemax: that of softmax over 1 + |x|."""
    y, x = ctx.saved_tensors
    if ctx.method == "log_softmax":
        dx = grad - y.exp() * grad.sum(-1, keepdim=True)
    else:
        dx = y * (grad - (grad * y).sum(-1, keepdim=True))
    if x is not None:
        dx = dx / (1 + x.abs())
    return dx.to(ctx.dtype), None, None


softmax_op = register(
    "align::softmax", _softmax, fake=_softmax_fake, backward=_softmax_backward, setup_context=_softmax_context
)


def _selective(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at targets [R, M], and the log-sum-exp [R] in float64."""
    stats = statistics(logits, targets, 1 / temperature, moments=False)
    return stats.logprob, stats.logsumexp


def _selective_fake(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = result_dtype(logits)
    return logits.new_empty(targets.shape, dtype=dtype), logits.new_empty(logits.shape[0], dtype=torch.float64)


def _selective_gradient(
    logits: Tensor, targets: Tensor, temperature: float, logsumexp: Tensor, g_logprob: Tensor, g_lse: Tensor
) -> Tensor:
    """Gradient of the logits in their dtype: (p (g_lse - sum_m g_m) + sum_m g_m 1[v = y_m]) / temperature."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    g_logprob = g_logprob.masked_fill(targets < 0, 0)
    a = g_lse.to(g_logprob.dtype) - g_logprob.sum(1)
    rows = max(1, BACKWARD_BYTES // (4 * max(1, logits.shape[1])))
    for start in range(0, logits.shape[0], rows):
        s = slice(start, start + rows)
        z = logits[s].to(result_dtype(logits)) / temperature
        d = logit_gradient(z, targets[s], logsumexp[s], a[s], g_logprob[s], slope=1 / temperature, dtype=logits.dtype)
        grad[s] = d
    return grad


def _selective_gradient_fake(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


selective_gradient_op = register(
    "align::selective_logprobs_backward", _selective_gradient, fake=_selective_gradient_fake
)


def _selective_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.temperature = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _selective_backward(ctx: Any, g_logprob: Tensor, g_lse: Tensor) -> tuple[Tensor, None, None]:
    logits, targets, logsumexp = ctx.saved_tensors
    arguments = (logits, targets, ctx.temperature, logsumexp, g_logprob, g_lse)
    return selective_gradient_op(*arguments), None, None


selective_logprobs_op = register(
    "align::selective_logprobs",
    _selective,
    fake=_selective_fake,
    backward=_selective_backward,
    setup_context=_selective_context,
)
