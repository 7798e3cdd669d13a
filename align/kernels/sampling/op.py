"""Sampling as torch knows it; nothing of it has a gradient."""

import ctypes

import torch
from torch import Tensor

from align.kernels import cuda, native
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
    with_rank: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token, raw and processed log-prob, entropy, rank, each [B], rank [0] if not asked for; settings are [B]."""
    settings = (temperature, top_k, top_p, min_p, seed, position)
    if native.usable(logits, scalar_wins=True):
        return _on_cpu(logits, *(setting.contiguous() for setting in settings), with_rank=with_rank)
    if not cuda.usable(logits):
        return reference.sample(logits, *settings, with_rank)
    rows, cols = logits.shape
    results = _results(logits, with_rank)
    cuda.launch("sampling", "sample", logits.dtype, rows, logits, logits.stride(0), cols, *settings, *results)
    return results


def _on_cpu(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    with_rank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = _results(logits, with_rank)
    token, raw, processed, entropy, rank = results
    failed = ctypes.c_int(0)
    args = native.SampleArgs(
        logits=logits.data_ptr(),
        cols=logits.shape[1],
        row_bytes=logits.stride(0) * logits.element_size(),
        temperature=temperature.data_ptr(),
        top_p=top_p.data_ptr(),
        min_p=min_p.data_ptr(),
        top_k=top_k.data_ptr(),
        seed=seed.data_ptr(),
        position=position.data_ptr(),
        token=token.data_ptr(),
        rank=rank.data_ptr(),
        raw=raw.data_ptr(),
        processed=processed.data_ptr(),
        entropy=entropy.data_ptr(),
        failed=ctypes.pointer(failed),
        dtype=native.DTYPES[logits.dtype],
    )
    native.call("align_sample", args, logits.shape[0], logits.numel())
    if failed.value:
        raise MemoryError(f"no memory to sample from rows of {logits.shape[1]} logits")
    return results


def _sample_fake(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    with_rank: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _results(logits, with_rank)


def _results(logits: Tensor, with_rank: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """To be filled; the address of an empty rank is NULL, which the kernels take for none."""
    rows = logits.shape[0]
    token, rank = (logits.new_empty(size, dtype=torch.int64) for size in (rows, rows * with_rank))
    raw, processed, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return token, raw, processed, entropy, rank


sample_op = register("align::sample", _sample, fake=_sample_fake)
