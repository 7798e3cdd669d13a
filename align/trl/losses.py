"""TRL's fifteen losses of a pair, with its quirks: who reads label smoothing, and what a micro-batch is a group for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

GROUPED = {"aot", "aot_unpaired"}
"""Losses that sort a micro-batch."""


@dataclass(frozen=True)
class Pairs:
    """What a loss knows of some pairs of one micro-batch."""

    chosen: Float[Tensor, " n"]
    """Sum of the tokens' log-probabilities, weighted where ld_alpha says so."""
    rejected: Float[Tensor, " n"]
    reference_chosen: Float[Tensor, " n"]
    reference_rejected: Float[Tensor, " n"]
    chosen_sum: Float[Tensor, " n"]
    """The same without weights."""
    chosen_length: Float[Tensor, " n"]
    """Completion tokens, at least 1."""
    rejected_length: Float[Tensor, " n"]
    token_share: float
    """Pairs of the micro-batch / chosen tokens of it."""
    weight: Float[Tensor, " n"] | None = None
    """WPO's, without gradient."""

    @property
    def ratio(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of policy and reference."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected


def divergence(ratio: Tensor, kind: str, alpha: float) -> Tensor:
    """f'(exp(ratio)) of an f-divergence up to a constant; the ratio itself for reverse_kl.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(alpha - 1.0) < 1e-6):
        return ratio
    if kind == "forward_kl":
        return 1 - torch.exp(-ratio)
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratio)
    if kind == "alpha_divergence":
        most = 11.0 if ratio.dtype == torch.float16 else 80.0
        power = torch.exp(((alpha - 1.0) * ratio).float().clamp(max=most))
        return (power - 1.0).to(ratio.dtype) / (alpha - 1.0)
    raise ValueError(f"Unknown f_divergence_type: {kind}")


def pair_losses(args: Any, pairs: Pairs) -> Float[Tensor, " n"]:
    """The weighted sum of a configuration's losses, of every pair.

    Args:
        args: a DPOConfig, TRL's or ours.
    """
    chosen, rejected = (divergence(r, args.f_divergence_type, args.f_alpha_divergence_coef) for r in pairs.ratio)
    total = torch.zeros_like(chosen)
    for name, weight in zip(args.loss_type, args.loss_weights or [1.0] * len(args.loss_type), strict=True):
        losses = LOSSES[name](args, pairs, chosen, rejected)
        total = total + weight * (losses if pairs.weight is None else losses * pairs.weight)
    return total


Loss = Callable[[Any, Pairs, Tensor, Tensor], Tensor]


def _sigmoid(args: Any, _: Pairs, chosen: Tensor, rejected: Tensor) -> Tensor:
    return -logsigmoid(args.beta * (chosen - rejected))


def _hinge(args: Any, _: Pairs, chosen: Tensor, rejected: Tensor) -> Tensor:
    return relu(1 - args.beta * (chosen - rejected))


def _ipo(args: Any, pairs: Pairs, chosen: Tensor, rejected: Tensor) -> Tensor:
    return (chosen / pairs.chosen_length - rejected / pairs.rejected_length - 1 / (2 * args.beta)) ** 2


def _sigmoid_norm(args: Any, pairs: Pairs, chosen: Tensor, rejected: Tensor) -> Tensor:
    return -logsigmoid(args.beta * (chosen / pairs.chosen_length - rejected / pairs.rejected_length))


def _exo(args: Any, _: Pairs, chosen: Tensor, rejected: Tensor) -> Tensor:
    x, epsilon = args.beta * (chosen - rejected), args.label_smoothing
    wins = x.sigmoid() * (logsigmoid(x) - math.log1p(-epsilon))
    return wins + (-x).sigmoid() * (logsigmoid(-x) - math.log(epsilon))


def _nca(args: Any, pairs: Pairs, *_: Tensor) -> Tensor:
    a, b = (args.beta * r for r in pairs.ratio)
    return -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)


def _robust(args: Any, _: Pairs, chosen: Tensor, rejected: Tensor) -> Tensor:
    x, epsilon = args.beta * (chosen - rejected), args.label_smoothing
    return (epsilon * logsigmoid(-x) - (1 - epsilon) * logsigmoid(x)) / (1 - 2 * epsilon)


def _bco(args: Any, pairs: Pairs, *_: Tensor) -> Tensor:
    a, b = (args.beta * r for r in pairs.ratio)
    return -logsigmoid(a) - logsigmoid(-b)


def _sppo(args: Any, pairs: Pairs, *_: Tensor) -> Tensor:
    a, b = pairs.ratio
    return (a - 0.5 / args.beta) ** 2 + (b + 0.5 / args.beta) ** 2


def _smoothed(args: Any, difference: Tensor) -> Tensor:
    x, epsilon = args.beta * difference, args.label_smoothing
    return -logsigmoid(x) * (1 - epsilon) - logsigmoid(-x) * epsilon


def _aot(args: Any, pairs: Pairs, *_: Tensor) -> Tensor:
    own, reference = pairs.chosen - pairs.rejected, pairs.reference_chosen - pairs.reference_rejected
    return _smoothed(args, own.sort(dim=0).values - reference.sort(dim=0).values)


def _aot_unpaired(args: Any, pairs: Pairs, *_: Tensor) -> Tensor:
    a, b = pairs.ratio
    return _smoothed(args, a.sort(dim=0).values - b.sort(dim=0).values)


def _apo_zero(args: Any, pairs: Pairs, *_: Tensor) -> Tensor:
    a, b = (args.beta * r for r in pairs.ratio)
    return 1 - a.sigmoid() + b.sigmoid()


def _apo_down(args: Any, pairs: Pairs, *_: Tensor) -> Tensor:
    a, b = (args.beta * r for r in pairs.ratio)
    return a.sigmoid() + 1 - (a - b).sigmoid()


def _discopop(args: Any, _: Pairs, chosen: Tensor, rejected: Tensor) -> Tensor:
    x = args.beta * (chosen - rejected)
    blend = (x / args.discopop_tau).sigmoid()
    return -logsigmoid(x) * (1 - blend) + torch.exp(-x) * blend


def _sft(_: Any, pairs: Pairs, *__: Tensor) -> Tensor:
    """The micro-batch's mean over chosen tokens: each pair's part of it, or under WPO's weights all of it for each."""
    losses = -pairs.chosen_sum * pairs.token_share
    return losses if pairs.weight is None else losses.mean().expand_as(losses)


LOSSES: dict[str, Loss] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "robust": _robust,
    "bco_pair": _bco,
    "sppo_hard": _sppo,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}
