"""CPOTrainer (SimPO and AlphaPO too), by TRL's arguments, columns, losses, logs and files."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from align.trl.config import CPOConfig
from align.trl.micro_batches import MicroBatch
from align.trl.policy_only import PolicyOnlyTrainer

log = logging.getLogger("align")

AVERAGED = ("ipo", "simpo")
"""Losses of the mean log-probability of a token."""


class CPOTrainer(PolicyOnlyTrainer):
    """Contrastive preference optimization, SimPO and AlphaPO, on pairs; see docs/trl.md."""

    _tag_names = ("align", "cpo")
    _name = "CPO"
    _paper = "arXiv 2401.08417"
    _config = CPOConfig

    def _check(self, args: Any) -> None:
        if args.loss_type not in LOSSES:
            raise ValueError(f"Unknown loss type: {args.loss_type}. Should be one of {[*LOSSES, 'alphapo']}")
        if args.loss_type in ("hinge", "ipo") and args.label_smoothing > 0:
            log.warning("label_smoothing has no effect: the loss %s does not read it", args.loss_type)

    def _take(self, model: Any, args: Any) -> None:
        super()._take(model, args)
        self.label_smoothing, self.loss_type, self.cpo_alpha = args.label_smoothing, args.loss_type, args.cpo_alpha
        self.simpo_gamma, self.alpha = args.simpo_gamma, args.alpha

    def _logps(self, micro: MicroBatch, sums: Tensor, present: Any = slice(None)) -> Tensor:
        """[2, n], of the sums that the loss is of."""
        return sums / self._lengths(micro)[:, present] if self.loss_type in AVERAGED else sums

    def _rewards(self, logps: Tensor) -> Tensor:
        """Log-probabilities, or AlphaPO's (1 - p^-alpha) / alpha of them."""
        return logps if self.alpha == 0.0 else (1 - torch.exp(-self.alpha * logps)) / self.alpha

    def _loss(self, micro: MicroBatch, rows: Tensor, values: dict[str, Tensor]) -> Tensor:
        both, present = self._both(micro, rows, values)
        chosen, rejected = self._rewards(self._logps(micro, both["logp"], present))
        losses = LOSSES[self.loss_type](self, chosen - rejected)
        return losses.sum() / len(present) + self.cpo_alpha * self._imitation(micro, both["logp_sum"][0])

    def _imitation(self, micro: MicroBatch, sums: Tensor) -> Tensor:
        """What chosen rows add to the micro-batch's mean loss of a chosen token."""
        return -sums.sum() / max(1, int(micro.counts[: len(micro.counts) // 2].sum()))

    def _figures(self, micro: MicroBatch, table: dict[str, Tensor]) -> dict[str, float]:
        logps = self._logps(micro, table["logp"].view(2, -1))
        found = self._pair_figures(micro, table, self.beta * self._rewards(logps), logps)
        nll = self._imitation(micro, table["logp_sum"].view(2, -1)[0])
        return found | {"nll_loss": self._mean(nll[None]) if self.cpo_alpha else 0.0}


def _sigmoid(of: CPOTrainer, difference: Tensor) -> Tensor:
    x, epsilon = of.beta * difference, of.label_smoothing
    return -logsigmoid(x) * (1 - epsilon) - logsigmoid(-x) * epsilon


def _simpo(of: CPOTrainer, difference: Tensor) -> Tensor:
    return _sigmoid(of, difference - of.simpo_gamma / of.beta)


def _hinge(of: CPOTrainer, difference: Tensor) -> Tensor:
    return relu(1 - of.beta * difference)


def _ipo(of: CPOTrainer, difference: Tensor) -> Tensor:
    return (difference - 1 / (2 * of.beta)) ** 2


LOSSES: dict[str, Callable[[CPOTrainer, Tensor], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _simpo,
}
