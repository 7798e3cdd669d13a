"""The head's operators as torch knows them: forward, backward of chunks computed again, and their autograd."""

from typing import Any

import torch
from torch import Tensor

from align.kernels.head import chunked
from align.kernels.head.chunked import Head
from align.kernels.head.workspace import logit_tile
from align.kernels.registration import register
from align.kernels.rows.tile import statistics


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    moments: bool,
    mode: str,
    chunk_rows: int,
    tops: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, temperature)
    logprob, logsumexp, entropy, log_sum_sq, saved, top = _outputs(hidden, weight, targets, mode, tops)
    rows = (targets >= 0).any(1).nonzero().squeeze(1)
    with logit_tile(min(len(rows), chunk_rows), weight.shape[0], logsumexp) as z:
        for index in chunked.chunks(rows, chunk_rows):
            chosen = targets[index]
            tile = chunked.logits_into(head, hidden[index], z[: len(index)])
            if tops:
                top[index] = _mean_and_top(tile, chosen).to(top.dtype)
            stats = statistics(tile, chosen, 1.0, moments)
            logprob[index], logsumexp[index] = stats.logprob, stats.logsumexp.to(logsumexp.dtype)
            entropy[index], log_sum_sq[index] = stats.entropy, stats.log_sum_sq
            if mode == "store":
                saved[index] = tile
            elif mode == "direction":
                along = chunked.direction(head, tile, stats.logsumexp, chunked.anchor_targets(chosen))
                saved[index] = along.to(saved.dtype)  # autocast makes the product another dtype than its factors
    return logprob, logsumexp, entropy, log_sum_sq, saved, top


def _mean_and_top(z: Tensor, targets: Tensor) -> Tensor:
    """[C, 2]: the mean logit, and 1 where the row's first target has the largest."""
    own = z.gather(1, chunked.anchor_targets(targets)[:, None])[:, 0]
    return torch.stack([z.mean(dim=1), (own >= z.amax(dim=1)).to(z.dtype)], dim=1)


def _outputs(hidden: Tensor, weight: Tensor, targets: Tensor, mode: str, tops: bool) -> tuple[Tensor, ...]:
    """Zero-filled results, and what the backward pass needs: directions, logits or nothing."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = [hidden.new_zeros(hidden.shape[0], dtype=dtype) for _ in range(3)]
    saved = {
        "direction": lambda: torch.zeros_like(hidden),
        "store": lambda: hidden.new_zeros(hidden.shape[0], weight.shape[0], dtype=dtype),
    }.get(mode, lambda: hidden.new_zeros(0))()
    top = hidden.new_zeros(hidden.shape[0] if tops else 0, 2, dtype=dtype)
    return hidden.new_zeros(targets.shape, dtype=dtype), *rows, saved, top


def _forward_fake(hidden: Tensor, weight: Tensor, targets: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    mode, _, *tops = arguments[8:]
    return _outputs(hidden, weight, targets, mode, bool(tops and tops[0]))


def _backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    moments: bool,
    chunk_rows: int,
    saved: Tensor,
    grads: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of hidden, weight, bias, lora_a, lora_b; an empty tensor where `needs` says no."""
    head = Head(weight, bias, lora_a, lora_b, lora_scale, logit_scale, softcap, temperature)
    totals = _gradients(hidden, weight, bias, lora_a, lora_b, needs, accumulate=True)
    rows = (targets >= 0).any(1).nonzero().squeeze(1)
    dtype = grads[1].dtype if any(needs[1:]) and hidden.device.type == "cpu" else hidden.dtype
    with logit_tile(min(len(rows), chunk_rows), weight.shape[0], grads[1]) as z:
        for index in chunked.chunks(rows, chunk_rows):
            x, chosen = hidden[index], targets[index]
            tile = saved[index] if saved.numel() else chunked.logits_into(head, x, z[: len(index)])
            stats = statistics(tile, chosen, 1.0, moments)
            d = chunked.output_gradient(head, tile, stats, chosen, [g[index] for g in grads], moments, dtype)
            if needs[0]:
                totals[0][index] = chunked.through_head(head, d)
            chunked.accumulate_head_gradients(head, x, d, totals, needs)
    inputs = (hidden, weight, bias, lora_a, lora_b)
    return [total if t is None else total.to(t.dtype) for total, t in zip(totals, inputs, strict=True)]


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    needs: list[bool],
    accumulate: bool,
) -> list[Tensor]:
    """Zeros for every gradient needed, in the inputs' dtypes or, to accumulate the head's, in float32."""
    totals = []
    for position, (t, needed) in enumerate(zip((hidden, weight, bias, lora_a, lora_b), needs, strict=True)):
        if t is None or not needed:
            totals.append(hidden.new_zeros(0))
        else:
            wide = accumulate and position > 0 and t.dtype != torch.float64
            totals.append(torch.zeros_like(t, dtype=torch.float32 if wide else t.dtype))
    return totals


def _backward_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Any, lora_a: Any, lora_b: Any, *rest: Any
) -> list[Tensor]:
    return _gradients(hidden, weight, bias, lora_a, lora_b, rest[-1], accumulate=False)


backward_op = register("align::linear_logprobs_backward", _backward, fake=_backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, lora_a, lora_b, *rest = inputs
    scalars, (moments, mode, chunk_rows) = rest[:4], rest[4:7]
    ctx.scalars, ctx.moments, ctx.mode, ctx.chunk_rows = scalars, moments, mode, chunk_rows
    ctx.set_materialize_grads(False)
    keep_hidden = hidden if mode in ("recompute", "store") else None
    ctx.save_for_backward(keep_hidden, weight, targets, bias, lora_a, lora_b, *output)


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, lora_a, lora_b, *output = ctx.saved_tensors
    unused = (None,) * 8
    if ctx.mode == "direction":
        head = Head(weight, bias, lora_a, lora_b, *ctx.scalars)
        dx = chunked.scale_direction(head, targets, output[0], output[1], output[4], grads[0], grads[1])
        return dx, None, None, None, None, None, *unused
    full = [torch.zeros_like(o) if g is None else g for g, o in zip(grads[:4], output[:4], strict=True)]
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4, 5)]
    tensors = (hidden, weight, targets, bias, lora_a, lora_b)
    pieces = backward_op(*tensors, *ctx.scalars, ctx.moments, ctx.chunk_rows, output[4], full, needs)
    given = [g if needed else None for g, needed in zip(pieces, needs, strict=True)]
    return *given[:2], None, *given[2:], *unused


linear_logprobs_op = register(
    "align::linear_logprobs", _forward, fake=_forward_fake, backward=_autograd, setup_context=_setup_context
)
