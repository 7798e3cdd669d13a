"""`linear_logprobs`: per-token log-probabilities from hidden states and an LM head, without logits."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.kernels.checks import check_floating, check_number, check_targets
from align.kernels.head import chunked
from align.kernels.head.op import linear_logprobs_op

Lora = tuple[Float[Tensor, "r H"], Float[Tensor, "V r"], float]
Mode = Literal["auto", "direction", "store", "recompute", "none"]
OUTPUTS = ("logprob", "logsumexp", "entropy", "log_sum_sq_probs", "mean_logit", "is_top")


@dataclass(frozen=True)
class LogprobOutput:
    """Float32 statistics of next-token distributions, in nats; 0 in rows without a target."""

    logprob: Float[Tensor, "*NM"]
    """log p(target), 0 where the target is ignored."""
    logsumexp: Float[Tensor, " N"] | None = None
    """log sum_v exp z_v, where asked for."""
    entropy: Float[Tensor, " N"] | None = None
    """-sum_v p_v log p_v, where asked for."""
    log_sum_sq_probs: Float[Tensor, " N"] | None = None
    """log sum_v p_v^2, where asked for."""
    mean_logit: Float[Tensor, " N"] | None = None
    """Mean over the vocabulary of z, without gradient, where asked for."""
    is_top: Float[Tensor, " N"] | None = None
    """1 where no token is likelier than the row's first target, where asked for."""


def linear_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, "*NM"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    lora: Lora | None = None,
    outputs: tuple[str, ...] = ("logprob",),
    grad: Mode = "auto",
    chunk_rows: int | None = None,
) -> LogprobOutput:
    """log softmax(z)[target] with z = cap tanh(logit_scale (h W' + scale (h A') B' + bias) / cap) / temperature.

    No [N, V] tensor exists: rows are taken `chunk_rows` at a time, rows whose targets are all negative not at all.
    Statistics are float32 whatever the inputs' dtype. `hidden` is cast to the weight's dtype.

    How gradients come about, by `grad`:
        "direction": the head is frozen. The forward pass keeps d logprob / d hidden (the size of `hidden`), the
            backward pass scales it; two products with W in all. entropy and log_sum_sq_probs come without gradient.
        "recompute": any head, every output differentiable; the backward pass computes each chunk's logits again.
        "store": as "recompute", but the forward pass keeps float32 logits [N, V].
        "none": no gradient.
        "auto": "none" where nothing asks for a gradient; "direction" for a frozen head unless entropy or
            log_sum_sq_probs is asked for; "recompute" otherwise.

    Args:
        hidden: last hidden states.
        weight: the LM head.
        targets: token ids, several per row if two-dimensional; negative ones are ignored.
        bias: added to the raw logits.
        logit_scale: factor of the raw logits.
        softcap: bound of the tanh soft-cap.
        temperature: divides the capped logits.
        lora: (A, B, scale) of an adapter on the head.
        outputs: which of "logprob", "logsumexp", "entropy", "log_sum_sq_probs", "mean_logit", "is_top" to fill; logprob
            always is.
        grad: see above.
        chunk_rows: rows at a time; by default as many as fill a float32 workspace of 192 MiB (CPU) or 640 MiB (GPU), of
            which up to three exist at once.

    Returns:
        The statistics asked for; zeros where a row has no target, empty for N = 0.

    Raises:
        ValueError: unknown output, targets that are not one (or one row) per hidden state, other shapes that do not fit
            or numbers of another kind, a setting out of its range, or "direction" with a head that requires gradients.
        IndexError: a target beyond the vocabulary (on a CPU).

    Source: ours; the idea of a gradient taken in the forward pass is Liger's and quack's, for scalar losses.
    """
    if unknown := set(outputs) - set(OUTPUTS):
        raise ValueError(f"unknown outputs {sorted(unknown)}; there are {OUTPUTS}")
    if targets.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"targets {list(targets.shape)} for hidden {list(hidden.shape)}; give one or more for each row"
        )
    lora_a, lora_b, lora_scale = lora if lora is not None else (None, None, 1.0)
    _check_shapes(hidden, weight, targets, bias, lora_a, lora_b)
    for name, value in (("temperature", temperature), ("softcap", softcap), ("chunk_rows", chunk_rows)):
        if value is not None:
            check_number("linear_logprobs", name, value, "a finite number above 0")
    trainable = any(t is not None and t.requires_grad for t in (weight, bias, lora_a, lora_b))
    moments = "entropy" in outputs or "log_sum_sq_probs" in outputs
    mode = _mode(grad, hidden.requires_grad, trainable, moments)
    results = linear_logprobs_op(
        hidden.to(weight.dtype),
        weight,
        (targets if targets.ndim == 2 else targets[:, None]).long(),
        bias,
        lora_a,
        lora_b,
        float(lora_scale),
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        moments,
        mode,
        chunk_rows or chunked.default_chunk_rows(weight.shape[0], hidden.device),
        "mean_logit" in outputs or "is_top" in outputs,
    )
    return _select(results, outputs, squeeze=targets.ndim == 1, detached=mode == "direction")


def _check_shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None
) -> None:
    """Refuse what the C kernels would read beyond its end."""
    check_floating("linear_logprobs", hidden=hidden, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)
    check_targets("linear_logprobs", targets, targets.shape)
    (columns, width), rank = weight.shape, 0 if lora_a is None else lora_a.shape[0]
    shapes = {"hidden": (hidden, (len(hidden), width)), "bias": (bias, (columns,))}
    shapes |= {"lora A": (lora_a, (rank, width)), "lora B": (lora_b, (columns, rank))}
    for name, (value, shape) in shapes.items():
        if value is not None and value.shape != shape:
            wanted = f"weight {list(weight.shape)} goes with {list(shape)}"
            raise ValueError(f"linear_logprobs: {name} is {list(value.shape)}; {wanted}")


def _mode(grad: Mode, hidden_needs: bool, trainable: bool, moments: bool) -> str:
    if grad == "direction" and trainable and torch.is_grad_enabled():
        raise ValueError('grad="direction" needs a frozen head: use grad="recompute" or freeze weight, bias and lora')
    if not torch.is_grad_enabled() or not (hidden_needs or trainable):
        return "none"
    if grad != "auto":
        return grad
    return "recompute" if trainable or moments else "direction"


def _select(results: tuple[Tensor, ...], outputs: tuple[str, ...], *, squeeze: bool, detached: bool) -> LogprobOutput:
    logprob, logsumexp, entropy, log_sum_sq, _, top = results
    top = top.detach()
    if detached:
        entropy, log_sum_sq = entropy.detach(), log_sum_sq.detach()
    return LogprobOutput(
        logprob=logprob.squeeze(1) if squeeze else logprob,
        logsumexp=logsumexp if "logsumexp" in outputs else None,
        entropy=entropy if "entropy" in outputs else None,
        log_sum_sq_probs=log_sum_sq if "log_sum_sq_probs" in outputs else None,
        mean_logit=top[:, 0] if "mean_logit" in outputs else None,
        is_top=top[:, 1] if "is_top" in outputs else None,
    )
