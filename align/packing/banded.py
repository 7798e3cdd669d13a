"""Tree attention with a sliding window on a CPU: a kernel on the parts of the band, as in flash.py."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.packing.flash import FLASH, Kernel, merge
from align.packing.trie import paths
from align.types import Branches


class Band(NamedTuple):
    """One call of the kernel: rows of queries, each against a row of keys, by their places in the packed row."""

    queries: Int[Tensor, "b n"]
    keys: Int[Tensor, "b m"]
    causal: bool
    """The i-th query sees the first i keys; otherwise all of them."""
    first: bool
    """No earlier part has these queries."""


def bands(branches: Branches, window: int, device: torch.device) -> list[Band]:
    """The calls that make up a row's attention, each token's to its own block of a window's length first.

    Within a block attention is causal. Of what is before it, its o-th token from 0 sees the window - 1 - o last tokens:
    with queries and keys both in reverse order that is causal too, and where a block is shorter than the window a
    rectangle besides, of what all of its tokens see.
    """
    found: dict[tuple[bool, bool, int, int], list[tuple[Tensor, Tensor]]] = {}
    for own, before in _runs(branches, window):
        for at in range(0, len(own), window):
            block = own[at : at + window]
            found.setdefault((True, True, len(block), len(block)), []).append((block, block))
            nearest = torch.cat([before, own[:at]])[-window + 1 :].flip(0) if window > 1 else block[:0]
            seeing = block[: window - 1]
            all_see = nearest[: window - 1 - len(seeing)]
            some_see = nearest[len(all_see) :]
            for queries, keys, causal in ((seeing, all_see, False), (seeing.flip(0), some_see, True)):
                if len(keys):
                    found.setdefault((False, causal, len(queries), len(keys)), []).append((queries, keys))
    parts = sorted(found.items(), key=lambda item: not item[0][0])
    made = []
    for (first, causal, _, _), same in parts:
        queries, keys = (torch.stack(rows).to(device) for rows in zip(*same, strict=True))
        made.append(Band(queries, keys, causal, first))
    return made


def _runs(branches: Branches, window: int) -> Iterator[tuple[Int[Tensor, " n"], Int[Tensor, " m"]]]:
    """Of every path where its tokens stand, and where those before it do that a window can reach."""
    stops = [0, *accumulate(branch.size for branch in branches)]
    heads = {start: number for number, start in enumerate(stops[:-1])}
    ends: list[Tensor] = []
    for number, (_, parent) in enumerate(branches):
        before = ends[parent] if parent >= 0 else torch.empty(0, dtype=torch.long)
        ends.append(torch.cat([before, torch.arange(stops[number], stops[number + 1])])[-window:])
    for path in paths(branches):
        parent = branches[heads[path.start]].parent
        yield torch.arange(path.start, path.stop), ends[parent] if parent >= 0 else torch.empty(0, dtype=torch.long)


def banded_tree_attention(
    query: Float[Tensor, "1 Hq T D"],
    key: Float[Tensor, "1 Hk T D"],
    value: Float[Tensor, "1 Hk T D"],
    plan: list[Band],
    scaling: float | None = None,
    kernel: Kernel = FLASH,
) -> Float[Tensor, "1 T Hq D"]:
    """As flash_tree_attention, of keys within a window, without computing what is outside.

    Args:
        plan: of the row's branches.
        scaling: 1 / sqrt(D) by default.
        kernel: of the parts.

    Source: ours
    """
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    return _BandedAttention.apply(*rows, plan, scaling, kernel)[None]


class _BandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: list[Band],
        scaling: float | None,
        kernel: Kernel,
    ) -> Float[Tensor, "T Hq D"]:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(*query.shape[:2], 1, dtype=torch.promote_types(query.dtype, torch.float32))
        for band in plan:
            q, k, v = (_rows(x, at) for x, at in ((query, band.queries), (key, band.keys), (value, band.keys)))
            own, own_lse = kernel.forward(q, k, v, causal=band.causal, scaling=scaling)
            own, own_lse = own.transpose(1, 2), own_lse.transpose(1, 2)[..., None]
            if not band.first:
                own, own_lse = merge(out[band.queries], lse[band.queries], own, own_lse)
            out[band.queries], lse[band.queries] = own.to(out.dtype), own_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scaling, ctx.kernel = plan, scaling, kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "T Hq D"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        for band in ctx.plan:
            g, q, o, total = (_rows(x, band.queries) for x in (grad, query, out, lse))
            k, v = (_rows(x, band.keys) for x in (key, value))
            given = (g, q, k, v, o, total.squeeze(-1))
            own = ctx.kernel.backward(*given, causal=band.causal, scaling=ctx.scaling)
            for target, at, part in zip((dq, dk, dv), (band.queries, band.keys, band.keys), own, strict=True):
                target.index_add_(0, at.flatten(), part.transpose(1, 2).flatten(0, 1))
        return dq, dk, dv, None, None, None


def _rows(x: Float[Tensor, "T H D"], at: Int[Tensor, "b n"]) -> Float[Tensor, "b H n D"]:
    return x[at].transpose(1, 2)
