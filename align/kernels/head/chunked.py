"""The chunked computation behind `linear_logprobs`: a tile of float32 logits at a time, never all of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.kernels import native
from align.kernels.rows.tile import RowStats, logit_gradient

CPU_WORKSPACE_BYTES = 3 * 2**26
GPU_WORKSPACE_BYTES = 640 * 2**20
COLUMN_TILE = 8192


@dataclass(frozen=True)
class Head:
    """An LM head: z = cap tanh(logit_scale (x W' + scale (x A') B' + bias) / cap) / temperature."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None
    lora_a: Float[Tensor, "r H"] | None
    lora_b: Float[Tensor, "V r"] | None
    lora_scale: float
    logit_scale: float
    softcap: float | None
    temperature: float

    @property
    def slope(self) -> float:
        """dz / draw without the soft-cap."""
        return self.logit_scale / self.temperature

    @property
    def bend(self) -> float:
        """The soft-cap's slope at a logit z is 1 - (bend z)^2; 0 without one."""
        return 0.0 if self.softcap is None else self.temperature / self.softcap


def default_chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose float32 logits fill the workspace: 192 MiB on a CPU, 640 MiB on a GPU; between 32 and 4096."""
    budget = CPU_WORKSPACE_BYTES if device.type == "cpu" else GPU_WORKSPACE_BYTES
    return max(32, min(4096, budget // (4 * max(1, vocabulary))))


def chunks(rows: Int[Tensor, " R"], chunk_rows: int) -> Iterator[Int[Tensor, " C"]]:
    """The row numbers in nearly equal pieces of at most `chunk_rows`."""
    pieces = -(-len(rows) // chunk_rows)
    return iter(rows.tensor_split(pieces) if pieces else ())


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 accumulation and result; on a GPU `a` is rounded to the dtype of `b`."""
    if b.dtype in (torch.float32, torch.float64):
        return a.to(b.dtype) @ b
    if b.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)


def logits_into(head: Head, x: Float[Tensor, "C H"], out: Float[Tensor, "C V"]) -> Float[Tensor, "C V"]:
    """The head's logits of some rows, in float32."""
    project(x, head.weight, out)
    if head.lora_a is not None and head.lora_b is not None:
        low_rank = head.lora_scale * (x.to(out.dtype) @ head.lora_a.to(out.dtype).T)
        for columns in column_tiles(head):
            out[:, columns].addmm_(low_rank, head.lora_b[columns].to(out.dtype).T)
    if head.bias is not None:
        out += head.bias
    if head.softcap is not None:
        out.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap / head.temperature)
    elif head.slope != 1:
        out *= head.slope
    return out


def project(x: Float[Tensor, "C H"], weight: Float[Tensor, "V H"], out: Float[Tensor, "C V"]) -> None:
    """out = x W' with float32 sums; on a CPU without bf16 products a column tile of the weight is upcast at a time."""
    if weight.dtype == out.dtype:
        torch.mm(x, weight.T, out=out)
    elif x.device.type != "cpu":
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    elif not native.linear_bf16(x, weight, out):
        wide = x.to(out.dtype)
        for start in range(0, weight.shape[0], COLUMN_TILE):
            columns = slice(start, start + COLUMN_TILE)
            out[:, columns] = wide @ weight[columns].to(out.dtype).T


def column_tiles(head: Head) -> Iterator[slice]:
    """The vocabulary in slices, for work that would otherwise copy something of its size."""
    return (slice(start, start + COLUMN_TILE) for start in range(0, head.weight.shape[0], COLUMN_TILE))


def anchor_targets(targets: Int[Tensor, "C M"]) -> Int[Tensor, " C"]:
    """Each row's first target that is not ignored; 0 where there is none."""
    first = (targets >= 0).int().argmax(1, keepdim=True)
    return targets.gather(1, first).squeeze(1).clamp_min(0)


def direction(
    head: Head, z: Float[Tensor, "C V"], logsumexp: Float[Tensor, " C"], anchor: Int[Tensor, " C"]
) -> Float[Tensor, "C H"]:
    """d log p(anchor) / d x up to the head's constant slope: (1[v = anchor] - p_v) through it; z is overwritten."""
    one = torch.ones_like(logsumexp, dtype=z.dtype)
    d = logit_gradient(z, anchor[:, None], logsumexp, -one, one[:, None], cap=head.bend, dtype=head.weight.dtype)
    return through_head(head, d)


def through_head(head: Head, d: Float[Tensor, "C V"]) -> Float[Tensor, "C H"]:
    """d W + scale (d B) A: a gradient of raw logits as a gradient of hidden states, in the head's dtype."""
    dx = d.to(head.weight.dtype) @ head.weight
    if head.lora_a is not None and head.lora_b is not None:
        dx = dx + (head.lora_scale * (d.to(head.lora_b.dtype) @ head.lora_b) @ head.lora_a).to(dx.dtype)
    return dx


def output_gradient(
    head: Head,
    z: Float[Tensor, "C V"],
    stats: RowStats,
    targets: Int[Tensor, "C M"],
    grads: list[Tensor],
    moments: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "C V"]:
    """Gradient of raw logits, from those of logprob, logsumexp, entropy and log_sum_sq; z is overwritten.

    dz_v = p_v (a - g_entropy log p_v) + 2 g_ss p_v^2 / sum p^2 + sum_m g_m 1[v = y_m]
    with a = g_lse - sum_m g_m - g_entropy entropy - 2 g_ss
    """
    g_logprob, g_lse, g_entropy, g_ss = grads
    g_logprob = g_logprob.masked_fill(targets < 0, 0)
    a, quadratic = g_lse - g_logprob.sum(1), None
    if moments:
        a = a - g_entropy * stats.entropy - 2 * g_ss
        quadratic = (-g_entropy, 2 * g_ss * torch.exp(-stats.log_sum_sq))
    return logit_gradient(
        z, targets, stats.logsumexp, a, g_logprob, quadratic=quadratic, cap=head.bend, slope=head.slope, dtype=dtype
    )


def accumulate_head_gradients(
    head: Head, x: Float[Tensor, "C H"], d: Float[Tensor, "C V"], totals: list[Tensor], needs: list[bool]
) -> None:
    """Add a chunk's gradients of weight, bias, lora_a and lora_b to float32 totals (places 1 to 4)."""
    if needs[1]:
        for columns in column_tiles(head):
            totals[1][columns] += matmul_float32(d[:, columns].T, x)
    if needs[2]:
        totals[2] += d.sum(0)
    if head.lora_a is not None and head.lora_b is not None:
        x, a, b = x.to(d.dtype), head.lora_a.to(d.dtype), head.lora_b.to(d.dtype)
        if needs[3]:
            totals[3] += head.lora_scale * (d @ b).T @ x
        if needs[4]:
            totals[4] += head.lora_scale * d.T @ (x @ a.T)


def head_rows(head: Head, tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n H"]:
    """The head's weight rows of some tokens, adapter included, in the saved statistics' precision."""
    rows = head.weight[tokens]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if head.lora_a is not None and head.lora_b is not None:
        rows = rows + head.lora_scale * (head.lora_b[tokens].to(rows.dtype) @ head.lora_a.to(rows.dtype))
    return rows


def scale_direction(
    head: Head,
    targets: Int[Tensor, "N M"],
    logprob: Float[Tensor, "N M"],
    logsumexp: Float[Tensor, " N"],
    u: Float[Tensor, "N H"],
    g_logprob: Float[Tensor, "N M"] | None,
    g_lse: Float[Tensor, " N"] | None,
) -> Float[Tensor, "N H"]:
    """Gradient of hidden states from the kept directions.

    With u_1 the first target's direction and w_m = s_m W[y_m] (s the soft-cap's slope), u_m = u_1 + w_m - w_1 and
    d lse / dx = w_1 - u_1.
    """
    g = torch.zeros_like(logprob) if g_logprob is None else g_logprob.masked_fill(targets < 0, 0)
    total = g.sum(1) if g_lse is None else g.sum(1) - g_lse
    dx = total[:, None] * u
    if targets.shape[1] > 1 or g_lse is not None:
        counted = (targets >= 0).any(1)
        z = logprob + logsumexp[:, None]
        slope = 1 - (head.bend * z) ** 2
        first = (targets >= 0).int().argmax(1, keepdim=True)
        coefficient = (g * slope).scatter_add(1, first, (-total * slope.gather(1, first).squeeze(1))[:, None])
        rows = head_rows(head, targets.clamp_min(0))
        dx = dx + torch.einsum("nm,nmh->nh", coefficient * counted[:, None], rows)
    return (dx * head.slope).to(u.dtype)
