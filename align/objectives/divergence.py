"""Divergences that a score against a reference may stand for: the links of f-DPO.

u is the log-ratio of policy and reference, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import Field

from align.section import Strict
from align.tensors import F, Float, Tensor, torch


class ReverseKL(Strict):
    """The link of DPO: identity."""

    name: Literal["reverse_kl"] = "reverse_kl"


class ForwardKL(Strict):
    """1 - e^{-u}."""

    name: Literal["forward_kl"] = "forward_kl"


class JensenShannon(Strict):
    """log 2 + log sigmoid(u)."""

    name: Literal["js"] = "js"


class AlphaDivergence(Strict):
    """(e^{(alpha - 1) u} - 1) / (alpha - 1)."""

    name: Literal["alpha"] = "alpha"
    alpha: float = 0.5
    """1 is reverse KL, 0 forward KL."""


Divergence = Annotated[ReverseKL | ForwardKL | JensenShannon | AlphaDivergence, Field(discriminator="name")]


def link(u: Float[Tensor, " N"], divergence: Mapping[str, str | float]) -> Float[Tensor, " N"]:
    """What the log-ratio becomes under a divergence, given as a mapping with its `name`."""
    options = {key: value for key, value in divergence.items() if key != "name"}
    return LINKS[str(divergence["name"])](u, **options)


def _reverse_kl(u: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return u


def _forward_kl(u: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return 1 - _capped_exp(-u)


def _js(u: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return math.log(2) + F.logsigmoid(u)


def _alpha(u: Float[Tensor, " N"], alpha: float) -> Float[Tensor, " N"]:
    if abs(alpha - 1) < 1e-6:
        return u
    return (_capped_exp((alpha - 1) * u) - 1) / (alpha - 1)


def _capped_exp(x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """e^x with the exponent held where the result can still be represented."""
    return x.clamp(max=11.0 if x.dtype == torch.float16 else 80.0).exp()


LINKS: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}
