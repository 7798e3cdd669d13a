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


class VarlenCall(NamedTuple):
    """One variable-length flash call: whose queries meet whose keys, and how."""

    queries: Runs
    keys: Runs
    causal: bool
    scaling: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Float[Tensor, "T Hq D"], Float[Tensor, "Hq T"]]:
        """Output and log-sum-exp over the call's keys."""
        return FORWARD(q, k, v, *self._lengths(), 0.0, self.causal, False, scale=self.scaling)[:2]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by q, k and v under an output and a log-sum-exp that may be of more keys than the call's."""
        unread = torch.zeros(2, dtype=torch.uint64, device=q.device)  # state of the dropout that there is none of
        given = (grad, q, k, v, out, lse, *self._lengths(), 0.0, self.causal, unread, unread[:0])
        return BACKWARD(*given, scale=self.scaling)

    def _lengths(self) -> tuple[Tensor, Tensor, int, int]:
        return self.queries.starts, self.keys.starts, self.queries.longest, self.keys.longest


class Layout(NamedTuple):
    """A packed row as two calls: every segment causal on itself, and every list's completions against its prompt."""

    own: Runs
    completions: Int[Tensor, " Tc"]
    """Rows of completions' tokens."""
    prompts: Int[Tensor, " Tp"]
    """Rows of prompts' tokens."""
    queries: Runs
    keys: Runs

    def calls(self, scaling: float) -> tuple[VarlenCall, VarlenCall]:
        """Every segment on itself; completions on their prompts."""
        own = VarlenCall(self.own, self.own, causal=True, scaling=scaling)
        return own, VarlenCall(self.queries, self.keys, causal=False, scaling=scaling)


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
        itself, across = plan.calls(scaling)
        out, lse = itself.forward(query, key, value)
        q, (k, v) = query[plan.completions], (x[plan.prompts] for x in (key, value))
        other, other_lse = across.forward(q, k, v)
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
        rows, prompts = ctx.plan.completions, ctx.plan.prompts
        itself, across = ctx.plan.calls(ctx.scaling)
        grad = grad.contiguous()
        dq, dk, dv = itself.backward(grad, query, key, value, out, lse)
        q, g, o = (x[rows] for x in (query, grad, out))
        k, v = key[prompts], value[prompts]
        total = lse[:, rows].contiguous()
        to_q, to_k, to_v = across.backward(g, q, k, v, o, total)
        dq[rows] += to_q
        dk[prompts] += to_k
        dv[prompts] += to_v
        return dq, dk, dv, None, None
