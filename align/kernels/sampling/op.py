"""Sampling as torch knows it; nothing of it has a gradient."""

import torch
from torch import Tensor

from align.kernels import cuda
from align.kernels.registration import register
from align.kernels.sampling import reference


def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token, raw and processed log-prob, entropy, rank, each [B]; the arguments after logits are [B] too."""
    settings = (temperature, top_k, top_p, min_p, seed, position)
    if not cuda.usable(logits):
        return reference.sample(logits, *settings)
    rows, cols = logits.shape
    results = _results(logits)
    token, raw, processed, entropy, rank = results
    given = (logits, logits.stride(0), cols, *settings, token, raw, processed, entropy, rank)
    cuda.launch("sampling", "sample", logits.dtype, rows, *given)
    return results


def _sample_fake(logits: Tensor, *settings: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _results(logits)


def _results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    token, rank = (logits.new_empty(rows, dtype=torch.int64) for _ in range(2))
    raw, processed, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return token, raw, processed, entropy, rank


sample_op = register("align::sample", _sample, fake=_sample_fake)
