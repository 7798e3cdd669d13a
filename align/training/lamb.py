"""LAMB, and two optimizers that share a model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lamb(Optimizer):
    """Adam's direction, of the length that the weights have: one trust ratio for each tensor.

    m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,  r = m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + decay w
    w -= lr ||w|| / ||r|| r, and w -= lr r where ||w|| or ||r|| is 0, as a LoRA's B begins

    Source: arXiv:1904.00962, algorithm 2 with phi(z) = z.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
            raise ValueError(f"betas are two numbers from 0 to below 1, got {betas}")
        if eps < 0:
            raise ValueError(f"eps is 0 or more, got {eps}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all tensors that have a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                self._move(parameter, state, group)
        return loss

    def _move(self, parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (beta1, beta2), gradient = group["betas"], parameter.grad
        state["step"] += 1
        step = state["step"].item()  # exact powers, of a number that parts of a checkpoint can hold
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**step)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        ratio = mean / ((square / (1 - beta2**step)).sqrt_() + group["eps"])
        ratio.add_(parameter, alpha=group["weight_decay"])
        weight, length = parameter.norm(), ratio.norm()
        trust = torch.where((weight > 0) & (length > 0), weight / length, torch.ones_like(weight))
        parameter.sub_(ratio * (group["lr"] * trust))


class Beside(Optimizer):
    """One optimizer for hidden matrices and torch's AdamW for all else, as one: Muon is defined on matrices alone.

    Both step on this one's groups and state, which are what a checkpoint keeps.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, kind: type[Optimizer], lr: float, **options: Any) -> None:
        """Args:
        params: groups; `matrices` of a group says whose it is.
        kind: of the optimizer of matrices, with its options.
        """
        groups = list(params)
        rest = {name: options[name] for name in ("weight_decay",) if name in options}
        self.parts: dict[bool, Optimizer] = {}
        for matrices, cls, own in ((True, kind, options), (False, torch.optim.AdamW, rest)):
            if mine := [group for group in groups if group["matrices"] == matrices]:
                self.parts[matrices] = cls(mine, lr=lr, **own)  # type: ignore[call-arg]
        # The parts have put their options into the groups.
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of each."""
        loss = closure() if closure else None
        for matrices, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if group["matrices"] == matrices]
            part.state = self.state
            part.step()
        return loss
