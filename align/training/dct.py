"""AdamW on gradients that are projected to columns of a cosine transform."""

from collections.abc import Callable, Iterable
from math import pi
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer


class DctAdamW(Optimizer):
    """Projected AdamW without an SVD: the basis is the same for all, and what is chosen of it is kept as places.

    Of a matrix G [m, n], m >= n (a wide one counts as its transpose), every `update_proj_gap` steps
        S = G Q,  places = those of the `rank` columns of S that are longest,  P = Q[:, places]
    and in every step AdamW's m and v of G P [m, rank], w -= lr scale (m / (sqrt(v) + eps)) P', and lr decay w. Q is the
    orthonormal DCT-II of n. Columns that are chosen again take their moments along; others begin at 0.

    Groups without a `rank`, and vectors, are AdamW's.

    Source: arXiv:2505.17967, without its feedback of what the projection leaves out.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
            raise ValueError(f"betas are two numbers from 0 to below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for name in ("rank", "update_proj_gap"):
                if group.get(name, 1) < 1:
                    raise ValueError(f"{name} is 1 or more, got {group[name]}")
        self.bases: dict[Any, Tensor] = {}
        """Q by size, device and dtype: computed again after a kill, to the same bits."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all tensors that have a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                self._move(parameter, self.state[parameter], group)
        return loss

    def _move(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        projects = "rank" in group and parameter.ndim == 2
        wide = projects and parameter.shape[0] < parameter.shape[1]
        gradient: Any = parameter.grad.T if wide else parameter.grad  # type: ignore[union-attr]
        state["step"] = state.get("step", 0) + 1
        basis = self._basis(gradient) if projects else None
        if basis is not None:
            if (state["step"] - 1) % group["update_proj_gap"] == 0:
                _choose(state, gradient @ basis, group["rank"])
            basis = basis[:, state["places"]]
            gradient = gradient @ basis
        if "exp_avg" not in state:
            state |= {name: torch.zeros_like(gradient) for name in ("exp_avg", "exp_avg_sq")}
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** state["step"])
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        moved = mean / ((square / (1 - beta2 ** state["step"])).sqrt_() + group["eps"])
        if basis is not None:
            moved = group["scale"] * (moved @ basis.T)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(moved.T if wide else moved, alpha=group["lr"])

    def _basis(self, gradient: Tensor) -> Float[Tensor, "n n"]:
        key = (gradient.shape[1], gradient.device, gradient.dtype)
        if key not in self.bases:
            self.bases[key] = dct(gradient.shape[1]).to(gradient.device, gradient.dtype)
        return self.bases[key]


def dct(size: int) -> Float[Tensor, "n n"]:
    """The orthonormal DCT-II: column j is sqrt(2 / n) cos(pi (i + 1/2) j / n), the first over sqrt(2); float64."""
    at = torch.arange(size, dtype=torch.float64)
    columns = torch.cos(pi / size * (at[:, None] + 0.5) * at) * (2 / size) ** 0.5
    columns[:, 0] /= 2**0.5
    return columns


def _choose(state: dict[str, Any], along: Float[Tensor, "m n"], rank: int) -> None:
    """Take the longest columns, in their order; those that stay keep their moments.

    Places are no tensor: torch reads an optimizer's tensors from a checkpoint in the weights' dtype.
    """
    places = sorted(along.norm(dim=0).topk(min(rank, along.shape[1])).indices.tolist())
    if "places" in state:
        for name in ("exp_avg", "exp_avg_sq"):
            every = torch.zeros_like(along)
            every[:, state["places"]] = state[name]
            state[name] = every[:, places]
    state["places"] = places
