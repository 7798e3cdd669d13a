"""Statistics and gradients of a tile of logits: the C kernels where they can read it, else torch."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from align.kernels import cuda, native


@dataclass(frozen=True)
class RowStats:
    """Per-row statistics of a tile, float32 (float64 for float64 tiles); entropy and log_sum_sq zero unless wanted."""

    logprob: Float[Tensor, "C M"]
    logsumexp: Float64[Tensor, " C"]
    """In float64, so that exp(z - logsumexp) is as exact as a softmax that subtracts the maximum first."""
    entropy: Float[Tensor, " C"]
    log_sum_sq: Float[Tensor, " C"]


def statistics(z: Float[Tensor, "C V"], targets: Int[Tensor, "C M"], scale: float, moments: bool) -> RowStats:
    """Statistics of softmax(scale z), one read of the tile.

    Args:
        z: logits in any dtype.
        targets: columns whose log-probability to give; 0 where negative.
        scale: positive factor of the logits.
        moments: also entropy and log sum p^2.

    Raises:
        IndexError: a target beyond the columns, on a CPU; a GPU's would have to be waited for.
    """
    if z.device.type == "cpu" and targets.numel() and (largest := int(targets.max())) >= z.shape[1]:
        row = int((targets >= z.shape[1]).any(1).nonzero()[0, 0])
        raise IndexError(f"target {largest} is beyond the vocabulary of {z.shape[1]} (the first such is in row {row})")
    if z.shape[1] == 0:
        nothing = z.new_zeros(z.shape[0], dtype=torch.float32)
        return RowStats(
            nothing.new_zeros(targets.shape), torch.full_like(nothing, -torch.inf).double(), nothing, nothing
        )
    if scale <= 0 or not (native.usable(z, scalar_wins=moments) or cuda.usable(z)):
        return _torch_statistics(z, targets, scale, moments)
    rows, cols = z.shape
    targets = targets.contiguous()
    stats = RowStats(
        z.new_zeros(targets.shape, dtype=torch.float32),
        z.new_zeros(rows, dtype=torch.float64),
        *(z.new_zeros(rows, dtype=torch.float32) for _ in range(2)),
    )
    if z.is_cuda:
        results = (stats.logprob, stats.logsumexp, stats.entropy, stats.log_sum_sq)
        given = (z, z.stride(0), cols, float(scale), targets, targets.shape[1])
        cuda.launch("rows", "row_statistics", z.dtype, rows, *given, *results, int(moments))
        return stats
    args = native.RowStatisticsArgs(
        x=z.data_ptr(),
        cols=cols,
        row_bytes=z.stride(0) * z.element_size(),
        targets=targets.data_ptr(),
        targets_per_row=targets.shape[1],
        scale=scale,
        logprob=stats.logprob.data_ptr(),
        logsumexp=stats.logsumexp.data_ptr(),
        entropy=native.pointer(stats.entropy if moments else None),
        log_sum_sq=native.pointer(stats.log_sum_sq if moments else None),
        dtype=native.DTYPES[z.dtype],
    )
    native.call("align_row_statistics", args, rows, z.numel())
    return stats


def _torch_statistics(z: Tensor, targets: Tensor, scale: float, moments: bool) -> RowStats:
    wide = z if z.dtype == torch.float64 else z.float()
    wide = wide if scale == 1 else wide * scale
    limit = torch.finfo(wide.dtype).max
    largest = wide.amax(1).clamp(-limit, limit)  # finite, so that infinities do not cancel to NaN
    log_sum = (wide - largest[:, None]).exp_().sum(1).log()
    logsumexp = largest.double() + log_sum
    chosen = wide.gather(1, targets.clamp_min(0)) - largest[:, None]  # exact near the maximum, where it matters
    logprob = (chosen - log_sum[:, None]).masked_fill_(targets < 0, 0)
    entropy, log_sum_sq = torch.zeros_like(log_sum), torch.zeros_like(log_sum)
    if moments:
        log_p = wide - largest[:, None] - log_sum[:, None]
        p = log_p.exp()
        entropy = -torch.special.xlogy(p, p).sum(1)
        log_sum_sq = log_p.mul_(2).logsumexp(1)
    return RowStats(logprob, logsumexp, entropy, log_sum_sq)


def logit_gradient(
    z: Float[Tensor, "C V"],
    targets: Int[Tensor, "C M"],
    logsumexp: Float64[Tensor, " C"],
    a: Float[Tensor, " C"],
    g: Float[Tensor, "C M"],
    *,
    quadratic: tuple[Float[Tensor, " C"], Float[Tensor, " C"]] | None = None,
    cap: float = 0.0,
    slope: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "C V"]:
    """d_v = (p_v (a + b log p_v + c p_v) + sum_m g_m 1[v = y_m]) (1 - (cap z_v)^2) slope; z is overwritten.

    Args:
        z: float32 logits.
        targets: y; negative ones are ignored.
        logsumexp: of z, so that log p = z - logsumexp.
        a: coefficient of p.
        g: what each target's own logit gets.
        quadratic: b and c; zero if None.
        cap: inverse of the tanh soft-cap z went through, 0 for none.
        slope: constant factor.
        dtype: of the result.

    Returns:
        In the memory of z. On a CPU a 16-bit result's rows lie one behind the other: torch's bf16 product on AMX reads
        behind the end of a row, where a view of every other half would have stale bits (torch 2.13).
    """
    if z.shape[1] == 0:
        return torch.empty_like(z, dtype=dtype)
    fits = z.dtype == torch.float32 and dtype in native.DTYPES and (native.usable(z) or cuda.usable(z))
    if not fits:
        d = _torch_gradient(z, targets, logsumexp, a, g, quadratic, cap, slope)
        return d if d.dtype == dtype else d.to(dtype, memory_format=torch.contiguous_format)
    rows, cols = z.shape
    if cols == 1:  # whatever the stride of an axis of one is, the halves of its element are neighbours
        z = z.as_strided(z.shape, (z.stride(0), 1))
    b, c = quadratic if quadratic is not None else (None, None)
    held = [None if t is None else t.contiguous() for t in (targets, logsumexp, a, b, c, g)]
    if z.is_cuda:
        coefficients = [held[2] if t is None else t for t in held[1:]]  # b and c are not read without moments
        given = (z, z.stride(0), cols, held[0], targets.shape[1], *coefficients, float(cap), float(slope))
        cuda.launch("rows", "logit_gradient", dtype, rows, *given, int(quadratic is not None))
        return z.view(dtype)[:, :cols]
    row_stride = z.stride(0) if dtype == z.dtype else cols
    scratch = torch.empty(targets.shape, dtype=torch.float64)
    args = native.LogitGradientArgs(
        z=z.data_ptr(),
        cols=cols,
        row_bytes=z.stride(0) * z.element_size(),
        out_row_bytes=row_stride * dtype.itemsize,
        targets=native.pointer(held[0]),
        targets_per_row=targets.shape[1],
        logsumexp=native.pointer(held[1]),
        a=native.pointer(held[2]),
        b=native.pointer(held[3]),
        c=native.pointer(held[4]),
        g=native.pointer(held[5]),
        scratch=scratch.data_ptr(),
        cap=cap,
        slope=slope,
        dtype=native.DTYPES[dtype],
    )
    native.call("align_logit_gradient", args, rows, z.numel())
    return z.view(dtype).as_strided((rows, cols), (row_stride, 1))


def _torch_gradient(
    z: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    a: Tensor,
    g: Tensor,
    quadratic: tuple[Tensor, Tensor] | None,
    cap: float,
    slope: float,
) -> Tensor:
    bent = None if cap == 0 else 1 - (z * cap) ** 2
    high = logsumexp.to(z.dtype)
    low = (logsumexp - high).nan_to_num(0).to(z.dtype)  # infinities leave no remainder
    log_p = z.sub_(high[:, None]).sub_(low[:, None])
    if quadratic is None:
        d = log_p.exp_().mul_(a[:, None])
    else:
        p = log_p.exp()
        factor = log_p.clamp_min_(-1e4).mul_(quadratic[0][:, None]).add_(a[:, None])
        d = factor.addcmul_(p, quadratic[1][:, None]).mul_(p)
    d.scatter_add_(1, targets.clamp_min(0), g.masked_fill(targets < 0, 0))
    d = d if bent is None else d.mul_(bent)
    return d if slope == 1 else d.mul_(slope)
