"""What `sample` computes, in plain torch; also its implementation wherever neither kernel can run."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(seed: Int[Tensor, " B"], position: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """A float64 in [0, 1) per row that depends on (seed, position) alone: splitmix64, top 53 bits."""
    return _shift(_mix(seed ^ _mix(position)), 11).double() * 2.0**-53


def _mix(x: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    x = x + _signed(GAMMA)
    x = (x ^ _shift(x, 30)) * _signed(FIRST)
    x = (x ^ _shift(x, 27)) * _signed(SECOND)
    return x ^ _shift(x, 31)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shift(x: Int[Tensor, " B"], bits: int) -> Int[Tensor, " B"]:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keep(
    logits: Float[Tensor, "B V"],
    temperature: Float[Tensor, " B"],
    top_k: Int[Tensor, " B"],
    top_p: Float[Tensor, " B"],
    min_p: Float[Tensor, " B"],
) -> Float[Tensor, "B V"]:
    """Tempered logits of the tokens that may be drawn, -inf elsewhere; each filter keeps all of equal logits.

    min-p: p >= min_p max p. top-k: not below the k-th largest. top-p, among what these left: tokens with less than
    top_p of the mass strictly above them. Temperature 0: the largest only.
    """
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
    z = logits.double() / heat
    top = z.amax(1, keepdim=True)
    z = z.masked_fill(z < top + min_p.double().log()[:, None], -torch.inf)
    ordered = z.sort(1, descending=True).values
    limit = torch.where(top_k > 0, top_k, z.shape[1]).clamp_max(z.shape[1])
    z = z.masked_fill(z < ordered.gather(1, limit[:, None] - 1), -torch.inf)
    ordered = z.sort(1, descending=True).values
    above = torch.softmax(ordered, 1).cumsum(1) - torch.softmax(ordered, 1)
    kept = (above < top_p.double()[:, None]).sum(1, keepdim=True).clamp_min(1)
    z = z.masked_fill((z < ordered.gather(1, kept - 1)) & (top_p < 1)[:, None], -torch.inf)
    return z.masked_fill((z < top) & (temperature <= 0)[:, None], -torch.inf)


def sample(
    logits: Float[Tensor, "B V"],
    temperature: Float[Tensor, " B"],
    top_k: Int[Tensor, " B"],
    top_p: Float[Tensor, " B"],
    min_p: Float[Tensor, " B"],
    seed: Int[Tensor, " B"],
    position: Int[Tensor, " B"],
    with_rank: bool = True,
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"], Int[Tensor, " R"]]:
    """Token by inverse CDF in token order, raw and processed log-prob, raw entropy, rank from 1 or else [0].

    Where the logits have no distribution, or a setting is out of its range, the raw log-prob and the entropy are NaN.
    """
    z = keep(logits, temperature, top_k.clamp_min(0), top_p, min_p.clamp(0, 1))
    cdf = torch.softmax(z, 1).cumsum(1)
    u = torch.where(temperature > 0, uniform(seed, position), 0.0)
    last = z.shape[1] - 1 - (z > -torch.inf).flip(1).int().argmax(1)  # rounding must not pass the last kept token
    token = torch.minimum((cdf <= u[:, None] * cdf[:, -1:]).sum(1), last)
    valid = (temperature >= 0) & (temperature < torch.inf) & (top_k >= 0)
    valid &= (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)
    log_p = torch.log_softmax(logits.double(), 1).masked_fill(~valid[:, None], torch.nan)
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1)
    chosen = token[:, None]
    processed = torch.log_softmax(z, 1).gather(1, chosen).squeeze(1).masked_fill(temperature <= 0, 0.0)
    rank = 1 + (logits > logits.gather(1, chosen)).sum(1) if with_rank else token.new_empty(0)
    return token, log_p.gather(1, chosen).squeeze(1).float(), processed.float(), entropy.float(), rank
