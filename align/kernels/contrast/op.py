"""Contrastive logits as torch knows them; decoding only, so without a gradient."""

import torch
from torch import Tensor

from align.kernels import cuda
from align.kernels.contrast import reference
from align.kernels.registration import register


def _contrast(logits: Tensor, pair: Tensor, alpha: Tensor, log_tau: float) -> Tensor:
    if not cuda.usable(logits):
        return reference.contrast_logits(logits, pair, alpha, log_tau)
    rows, cols = logits.shape
    out = _contrast_fake(logits)
    given = (logits, logits.stride(0), cols, pair, alpha, log_tau, out)
    cuda.launch("contrast", "contrast_logits", logits.dtype, rows, *given)
    return out


def _contrast_fake(logits: Tensor, *rest: Tensor | float) -> Tensor:
    return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)


contrast_logits_op = register("align::contrast_logits", _contrast, fake=_contrast_fake)
