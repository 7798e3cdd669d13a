"""Attention with a soft-cap of its logits on parts of a tree: plain operations, on a CPU, with few logits at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 128
"""Queries whose logits are in memory together."""


class _Tile(NamedTuple):
    """Some queries against the keys that they can see."""

    rows: slice
    keys: slice
    tanh: Float[Tensor, "B Hk G n m"]
    """Of their logits over the cap."""
    logits: Float[Tensor, "B Hk G n m"]
    """Capped; -inf where a query does not see a key."""


@dataclass(frozen=True)
class Capped:
    """A kernel of parts, as flash.py has them: softmax(cap tanh(scaling Q K' / cap)) V."""

    cap: float

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float | None
    ) -> tuple[Float[Tensor, "B Hq L D"], Float[Tensor, "B Hq L"]]:
        """Output, and log-sum-exp of the logits."""
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_exact(query))
        for tile in self._tiles(query, key, causal, scaling):
            own = tile.logits.logsumexp(-1, keepdim=True)
            weights = tile.logits.sub_(own).exp_().to(value.dtype)
            out[:, :, tile.rows] = (weights.flatten(2, 3) @ value[:, :, tile.keys]).view_as(out[:, :, tile.rows])
            lse[:, :, tile.rows] = own.flatten(1, 2).squeeze(-1)
        return out, lse

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
        """Gradients of query, key and value under the whole's `out` and `lse`.

        With P = exp(s - lse) and t = tanh(scaling Q K' / cap), dx = P (dO V' - rowsum(dO O)) (1 - t^2).
        """
        scale = _scale(query, scaling)
        dq = torch.empty_like(query)
        dk, dv = (torch.zeros_like(x, dtype=_exact(x)) for x in (key, value))
        for rows, keys, tanh, logits in self._tiles(query, key, causal, scaling):
            g, q, o, total = (_grouped(x[:, :, rows], key) for x in (grad, query, out, lse[..., None]))
            k, v = key[:, :, keys], value[:, :, keys]
            weights = logits.sub_(total.view(*logits.shape[:-1], 1)).exp_().flatten(2, 3)
            dv[:, :, keys] += weights.to(g.dtype).mT @ g
            inner = (g * o).sum(-1, keepdim=True, dtype=_exact(g))
            slope = tanh.flatten(2, 3).square_().neg_().add_(1)
            dx = (g @ v.mT).sub(inner).mul_(weights).mul_(slope).mul_(scale).to(q.dtype)
            dq[:, :, rows] = (dx @ k).view_as(dq[:, :, rows])
            dk[:, :, keys] += dx.mT @ q
        return dq, dk.to(key.dtype), dv.to(value.dtype)

    def _tiles(self, query: Tensor, key: Tensor, causal: bool, scaling: float | None) -> Iterator[_Tile]:
        """The i-th query from 0 sees the i + 1 first keys if causal, else all."""
        for start in range(0, query.shape[2], ROWS):
            rows = slice(start, min(start + ROWS, query.shape[2]))
            keys = slice(0, min(rows.stop, key.shape[2]) if causal else key.shape[2])
            q = _grouped(query[:, :, rows], key)
            x = (q @ key[:, :, keys].mT).to(_exact(query)).unflatten(2, (-1, rows.stop - start))
            tanh = x.mul_(_scale(query, scaling) / self.cap).tanh_()
            logits = tanh * self.cap
            if causal:
                seen = torch.arange(start, rows.stop)[:, None] >= torch.arange(keys.stop)
                logits.masked_fill_(~seen, -torch.inf)
            yield _Tile(rows, keys, tanh, logits)


def _grouped(x: Float[Tensor, "B Hq n D"], key: Tensor) -> Float[Tensor, "B Hk G*n D"]:
    """The rows of all heads that share a key head, one after the other."""
    return x.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _scale(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
