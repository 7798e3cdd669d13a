"""Tree attention on a CPU: a kernel on the parts of a tree that hold anything, merged by log-sum-exp."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from align.packing.trie import paths
from align.types import Branches


class Kernel(Protocol):
    """Attention of queries to keys, either with fewer key heads than query heads; a part's own, or under a whole's
    log-sum-exp."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float | None
    ) -> tuple[Float[Tensor, "B Hq L D"], Float[Tensor, "B Hq L"]]:
        """Output, and log-sum-exp of the logits."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scaling: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part's share of the gradients of query, key and value."""
        ...


class Flash:
    """torch's flash kernel.

    Its operations are private to torch, and what scaled_dot_product_attention itself calls on a CPU. They are the only
    way to a part's log-sum-exp and to its backward pass under another one.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        made: tuple[Tensor, Tensor] = attend(query, key, value, 0.0, causal, scale=scaling)
        return made

    def backward(self, *tensors: Tensor, causal: bool, scaling: float | None) -> tuple[Tensor, Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        made: tuple[Tensor, Tensor, Tensor] = attend(*tensors, 0.0, causal, scale=scaling)
        return made


FLASH = Flash()


class Part(NamedTuple):
    """One call of the kernel: `blocks` runs of queries of equal length, each against keys of its own."""

    queries: slice
    keys: slice
    causal: bool
    """Queries are the keys' own tokens; otherwise they stand behind all of them."""
    first: bool
    """No earlier part has these queries."""
    blocks: int = 1


def parts(branches: Branches) -> Iterator[Part]:
    """The calls that make up a row's attention, each path's own before those of what turns off from it."""
    alike = groupby(paths(branches), key=lambda path: (path.stop - path.start, path.depth, path.turns))
    for (length, depth, turns), run in alike:
        same = list(run)
        # What turns off a path lies between it and the next one, so that only paths without turns are neighbours.
        own = slice(same[0].start, same[0].start + len(same) * length)
        yield Part(own, own, causal=True, first=depth == 0, blocks=len(same))
        for queries, stop in turns:
            yield Part(queries, slice(own.start, stop), causal=False, first=depth == 0)


def flash_tree_attention(
    query: Float[Tensor, "1 Hq T D"],
    key: Float[Tensor, "1 Hk T D"],
    value: Float[Tensor, "1 Hk T D"],
    branches: Branches,
    scaling: float | None = None,
    kernel: Kernel = FLASH,
) -> Float[Tensor, "1 T Hq D"]:
    """softmax(scaling Q K' + mask) V, where every branch sees those that it goes on from and its own past.

    With o_a, l_a the output and log-sum-exp over the keys of one part and o_b, l_b over those of another:
    l = log(e^l_a + e^l_b), o = e^(l_a - l) o_a + e^(l_b - l) o_b. The gradient is the sum of each part's flash backward
    pass under o and l, since P_a = exp(s - l) and rowsum(do * o) are all that such a pass needs of the whole.

    Args:
        branches: of the row.
        scaling: 1 / sqrt(D) by default.
        kernel: of the parts; another one's softmax is of its own logits.

    Source: ours; the merge is that of ring attention and flash decoding.
    """
    return _TreeAttention.apply(query, key, value, branches, scaling, kernel)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        branches: Branches,
        scaling: float | None,
        kernel: Kernel,
    ) -> Float[Tensor, "1 T Hq D"]:
        heads, tokens = query.shape[1:3]
        out = query.new_empty(1, tokens, heads, query.shape[3]).transpose(1, 2)
        exact = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(1, tokens, heads, 1, dtype=exact).transpose(1, 2)
        for part in parts(branches):
            q, o, total = (_blocks(x, part.queries, part.blocks) for x in (query, out, lse))
            k, v = (_blocks(x, part.keys, part.blocks) for x in (key, value))
            own, own_lse = kernel.forward(q, k, v, causal=part.causal, scaling=scaling)
            if part.first:
                o.copy_(own)
                total.copy_(own_lse[..., None])
            else:
                for target, merged in zip((o, total), merge(o, total, own, own_lse[..., None]), strict=True):
                    target.copy_(merged)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.branches, ctx.scaling, ctx.kernel = branches, scaling, kernel
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "1 T Hq D"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
        for part in parts(ctx.branches):
            g, q, o, total = (_blocks(x, part.queries, part.blocks) for x in (grad, query, out, lse))
            k, v = (_blocks(x, part.keys, part.blocks) for x in (key, value))
            given = (g, q, k, v, o, total.squeeze(-1))
            own = ctx.kernel.backward(*given, causal=part.causal, scaling=ctx.scaling)
            # Every path's keys meet its own queries before those of what turns off from it.
            _put(dq, part.queries, part.blocks, own[0], add=not part.first)
            _put(dk, part.keys, part.blocks, own[1], add=not part.causal)
            _put(dv, part.keys, part.blocks, own[2], add=not part.causal)
        return dq, dk, dv, None, None, None


def _blocks(x: Float[Tensor, "1 H T D"], rows: slice, count: int) -> Float[Tensor, "count H L D"]:
    """A view of rows as so many blocks of equal length."""
    return x[0, :, rows].unflatten(1, (count, -1)).transpose(0, 1)


def _put(target: Tensor, rows: slice, count: int, values: Tensor, *, add: bool) -> None:
    view = _blocks(target, rows, count)
    if add:
        view.add_(values)
    else:
        view.copy_(values)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two parts of the keys as one over both."""
    total = torch.logaddexp(lse, other_lse)
    return out * (lse - total).exp() + other * (other_lse - total).exp(), total
