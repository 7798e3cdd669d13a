"""What `linear_logprobs` computes, in a few lines of plain torch that hold every logit."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def linear_logits(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    lora: tuple[Float[Tensor, "r H"], Float[Tensor, "V r"], float] | None = None,
) -> Float[Tensor, "N V"]:
    """Logits of an LM head in the inputs' dtype.

    raw = hidden W' + scale (hidden A') B' + bias;  z = cap tanh(logit_scale raw / cap) / temperature
    """
    logits = hidden @ weight.T
    if lora is not None:
        lora_a, lora_b, scale = lora
        logits = logits + scale * (hidden @ lora_a.T) @ lora_b.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_statistics(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, "N M"]
) -> tuple[Float[Tensor, "N M"], Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probability of each target, log-sum-exp, entropy and log sum of squared probabilities; 0 where ignored."""
    scored = targets >= 0
    counted = scored.any(1)
    log_p = torch.log_softmax(logits, dim=-1)
    logprob = log_p.gather(1, targets.clamp_min(0)).masked_fill(~scored, 0)
    per_row = (logits.logsumexp(-1), -(log_p.exp() * log_p).sum(-1), (2 * log_p).logsumexp(-1))
    logsumexp, entropy, log_sum_sq = (value.masked_fill(~counted, 0) for value in per_row)
    return logprob, logsumexp, entropy, log_sum_sq
