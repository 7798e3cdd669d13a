"""Tree attention on a GPU: two variable-length flash calls per layer for all lists of a row, merged by log-sum-exp."""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.packing.flash import Segments

# Private to torch, and what torch.nn.attention.varlen calls. They are the only way to a part's backward pass under
# another log-sum-exp, and they take fewer key heads than query heads.
FORWARD = torch.ops.aten._flash_attention_forward
BACKWARD = torch.ops.aten._flash_attention_backward
DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_WIDTH = 256


class Runs(NamedTuple):
    """Sequences of one call: where each begins among the rows given, and the longest."""

    starts: Int[Tensor, " S+1"]
    longest: int


class Layout(NamedTuple):
    """A packed row as two calls: every segment causal on itself, and every list's completions against its prompt."""

    own: Runs
    completions: Int[Tensor, " Tc"]
    """Rows of completions' tokens."""
    prompts: Int[Tensor, " Tp"]
    """Rows of prompts' tokens."""
    queries: Runs
    keys: Runs


def layout(segments: Segments, device: torch.device) -> Layout:
    """The calls' sequences; made on the host, where segments are known, so that nothing waits for the device."""
    completions: list[int] = []
    prompts: list[int] = []
    start = 0
    for prompt, *sizes in segments:
        prompts += range(start, start + prompt)
        completions += range(start + prompt, start + prompt + sum(sizes))
        start += prompt + sum(sizes)

    def runs(sizes: list[int]) -> Runs:
        starts = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        return Runs(starts.to(device, non_blocking=True), max(sizes))

    return Layout(
        own=runs([size for sizes in segments for size in sizes]),
        completions=torch.tensor(completions).to(device, non_blocking=True),
        prompts=torch.tensor(prompts).to(device, non_blocking=True),
        queries=runs([sum(sizes[1:]) for sizes in segments]),
        keys=runs([sizes[0] for sizes in segments]),
    )


def varlen_tree_attention(
    query: Float[Tensor, "1 Hq T D"],
    key: Float[Tensor, "1 Hk T D"],
    value: Float[Tensor, "1 Hk T D"],
    plan: Layout,
    scaling: float | None = None,
) -> Float[Tensor, "1 T Hq D"]:
    """As flash_tree_attention, in a number of kernel calls that does not depend on the number of lists.

    Args:
        plan: of the row's segments.
        scaling: 1 / sqrt(D) by default.

    Source: ours; the merge is that of ring attention and flash decoding.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    return _VarlenTreeAttention.apply(*rows, plan, scaling)[None]


class _VarlenTreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Layout, scaling: float
    ) -> Float[Tensor, "T Hq D"]:
        out, lse = _forward(query, key, value, plan.own, plan.own, True, scaling)
        q, (k, v) = query[plan.completions], (x[plan.prompts] for x in (key, value))
        other, other_lse = _forward(q, k, v, plan.queries, plan.keys, False, scaling)
        own, own_lse = out[plan.completions], lse[:, plan.completions]
        total = torch.logaddexp(own_lse, other_lse)
        weight, other_weight = ((part - total).exp().T[..., None] for part in (own_lse, other_lse))
        out[plan.completions] = (own * weight + other * other_weight).to(out.dtype)
        lse[:, plan.completions] = total
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scaling = plan, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "T Hq D"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        plan, rows, prompts = ctx.plan, ctx.plan.completions, ctx.plan.prompts
        grad = grad.contiguous()
        dq, dk, dv = _backward(grad, query, key, value, out, lse, plan.own, plan.own, True, ctx.scaling)
        q, g, o = (x[rows] for x in (query, grad, out))
        k, v = key[prompts], value[prompts]
        total = lse[:, rows].contiguous()
        to_q, to_k, to_v = _backward(g, q, k, v, o, total, plan.queries, plan.keys, False, ctx.scaling)
        dq[rows] += to_q
        dk[prompts] += to_k
        dv[prompts] += to_v
        return dq, dk, dv, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Runs, keys: Runs, causal: bool, scaling: float
) -> tuple[Float[Tensor, "T Hq D"], Float[Tensor, "Hq T"]]:
    lengths = (queries.starts, keys.starts, queries.longest, keys.longest)
    return FORWARD(q, k, v, *lengths, 0.0, causal, False, scale=scaling)[:2]


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Runs,
    keys: Runs,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (queries.starts, keys.starts, queries.longest, keys.longest)
    unread = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of the dropout that there is none of
    return BACKWARD(grad, q, k, v, out, lse, *lengths, 0.0, causal, unread, unread[:0], scale=scaling)
