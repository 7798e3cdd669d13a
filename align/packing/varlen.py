"""Tree attention on a GPU: a variable-length flash call for each depth of a row's trees, merged by log-sum-exp."""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.packing.trie import paths
from align.types import Branches

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


class Level(NamedTuple):
    """What turns off from paths of one depth: its tokens, and those of the paths that it sees."""

    queries: Int[Tensor, " Tq"]
    """Their rows, each once."""
    keys: Int[Tensor, " Tk"]
    """Their rows; what turns off from a path at several places sees its beginning at each."""
    query_runs: Runs
    key_runs: Runs


class Layout(NamedTuple):
    """A packed row as one call for all paths, causal on themselves, and one for each depth of turning off from them."""

    own: Runs
    levels: list[Level]


def layout(branches: Branches, device: torch.device) -> Layout:
    """The calls' sequences; made on the host, where branches are known, so that nothing waits for the device."""
    found = list(paths(branches))

    def runs(sizes: list[int]) -> Runs:
        starts = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
        return Runs(starts.to(device, non_blocking=True), max(sizes))

    def rows(ranges: list[range]) -> Tensor:
        return torch.tensor([row for own in ranges for row in own]).to(device, non_blocking=True)

    levels = []
    for depth in range(max(path.depth for path in found)):
        turns = [(turn, range(p.start, stop)) for p in found if p.depth == depth for turn, stop in p.turns]
        queries, keys = [range(turn.start, turn.stop) for turn, _ in turns], [seen for _, seen in turns]
        levels.append(Level(rows(queries), rows(keys), runs([*map(len, queries)]), runs([*map(len, keys)])))
    return Layout(runs([path.stop - path.start for path in found]), levels)


def varlen_tree_attention(
    query: Float[Tensor, "1 Hq T D"],
    key: Float[Tensor, "1 Hk T D"],
    value: Float[Tensor, "1 Hk T D"],
    plan: Layout,
    scaling: float | None = None,
) -> Float[Tensor, "1 T Hq D"]:
    """As flash_tree_attention, in a number of kernel calls that depends on the depth of the trees alone: two for lists.

    Args:
        plan: of the row's branches.
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
        out, lse = VarlenCall(plan.own, plan.own, causal=True, scaling=scaling).forward(query, key, value)
        for level in plan.levels:
            rows = level.queries
            q, (k, v) = query[rows], (x[level.keys] for x in (key, value))
            other, other_lse = _call(level, scaling).forward(q, k, v)
            own_lse = lse[:, rows]
            total = torch.logaddexp(own_lse, other_lse)
            weight, other_weight = ((part - total).exp().T[..., None] for part in (own_lse, other_lse))
            out[rows] = (out[rows] * weight + other * other_weight).to(out.dtype)
            lse[:, rows] = total
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scaling = plan, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "T Hq D"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        itself = VarlenCall(ctx.plan.own, ctx.plan.own, causal=True, scaling=ctx.scaling)
        dq, dk, dv = itself.backward(grad, query, key, value, out, lse)
        for level in ctx.plan.levels:
            q, g, o = (x[level.queries] for x in (query, grad, out))
            k, v = key[level.keys], value[level.keys]
            total = lse[:, level.queries].contiguous()
            to_q, to_k, to_v = _call(level, ctx.scaling).backward(g, q, k, v, o, total)
            dq[level.queries] += to_q
            dk.index_add_(0, level.keys, to_k)
            dv.index_add_(0, level.keys, to_v)
        return dq, dk, dv, None, None


def _call(level: Level, scaling: float) -> VarlenCall:
    return VarlenCall(level.query_runs, level.key_runs, causal=False, scaling=scaling)
