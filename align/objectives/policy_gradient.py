"""Neural PG-RANK: policy gradient of the expected NDCG of rankings drawn from the scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from align.objectives.base import Properties
from align.objectives.lists import ordered_pairs
from align.objectives.objective import OBJECTIVE, Objective
from align.tensors import Bool, Float, Int, Tensor, torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer: the increment of splitmix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def pl_policy_gradient(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    keys: Int[Tensor, "B K"] | None = None,
    samples: int = 16,
    cutoff: int | None = None,
    seed: int = 0,
) -> Float[Tensor, " B"]:
    """Neural PG-RANK: rankings are drawn from Plackett-Luce and made likelier by how much they beat the others' NDCG.

    -(1/N) sum_n (U_n - mean over m != n of U_m) log pi(r_n),  log pi(r) = sum_k [s_{r_k} - logsumexp_{m >= k} s_{r_m}]

    The draw is a function of the seed and the completions' keys alone: neither rounding nor padding nor the batch that
    a list is in changes it, and lists that look the same do not share it.

    Args:
        scores: s in nats, beta included.
        grades: g >= 0; the gain of a completion is 2^g - 1.
        list_mask: False marks padding, whose score and grade may hold anything, even NaN.
        keys: a number for each completion, from `completion_keys`; other keys, other draws. Anything on padding. None
            numbers them by their place in the batch.
        samples: N, rankings drawn per list, at least 2.
        cutoff: U is the NDCG of this many first ranks; None takes all.
        seed: another seed, other draws.

    Returns:
        One value per list whose gradient estimates that of minus the expected NDCG (the value itself means little);
        0 with zero gradient for a list of ties.

    Source: Neural PG-RANK, arXiv:2310.04407 (abstract and a third-party implementation); where the noise is from: ours.
    """
    scores = scores.masked_fill(~list_mask, 0)
    grades = grades.masked_fill(~list_mask, 0)
    if keys is None:
        keys = completion_keys(torch.arange(len(scores), device=scores.device), scores.shape[1])
    noise = _gumbel(keys, samples, seed)
    perturbed = (scores.detach()[:, None, :] + noise).masked_fill(~list_mask[:, None, :], -torch.inf)
    ranking = perturbed.argsort(dim=2, descending=True)
    utility = _ndcg(torch.exp2(grades) - 1, ranking, cutoff).to(scores.dtype)
    all_tied = ~ordered_pairs(grades, list_mask).any(dim=2).any(dim=1)  # then U is constant but for rounding
    advantage = (utility - utility.mean(dim=1, keepdim=True)).masked_fill(all_tied[:, None], 0)
    advantage = advantage * samples / (samples - 1)
    return -(advantage * _log_probability(scores, list_mask, ranking)).mean(dim=1)


@OBJECTIVE.add
class PlPolicyGradient(Objective):
    """Neural PG-RANK."""

    formula = staticmethod(pl_policy_gradient)
    properties = Properties(
        shift_invariant=True, zero_when_tied=True, dpo_at_two=False, grades="relevance", of_rewards=True
    )

    name: Literal["pl_policy_gradient"] = "pl_policy_gradient"
    samples: Annotated[int, Field(ge=2)] = 16
    """Rankings drawn per list and step."""
    cutoff: Annotated[int, Field(ge=1)] | None = None
    """Reward only this many first ranks (NDCG@k)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws."""


def _log_probability(
    scores: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"], ranking: Int[Tensor, "B N K"]
) -> Float[Tensor, "B N"]:
    """log pi(r) under Plackett-Luce; padding is ranked last and counts nothing."""
    ranked = scores[:, None, :].expand(ranking.shape).gather(2, ranking)
    real = list_mask[:, None, :].expand(ranking.shape).gather(2, ranking)
    rest = ranked.masked_fill(~real, -torch.inf).flip(2).logcumsumexp(dim=2).flip(2)
    return (ranked - rest).masked_fill(~real, 0).sum(dim=2)


def _ndcg(gains: Float[Tensor, "B K"], ranking: Int[Tensor, "B N K"], cutoff: int | None) -> Float[Tensor, "B N"]:
    """NDCG of each ranking; 0 where all gains are 0."""
    places = torch.arange(gains.shape[1], device=gains.device, dtype=gains.dtype)
    discount = (1 / torch.log2(places + 2)).masked_fill(places >= (cutoff or gains.shape[1]), 0)
    ranked = gains[:, None, :].expand(ranking.shape).gather(2, ranking)
    ideal = (gains.sort(dim=1, descending=True).values * discount).sum(dim=1, keepdim=True)
    return (ranked * discount).sum(dim=2) / ideal.masked_fill(ideal == 0, 1)


def completion_keys(list_keys: Int[Tensor, " B"], width: int) -> Int[Tensor, "B K"]:
    """A number for each completion from its list's and its place in the row; what `pl_policy_gradient` draws by.

    Args:
        list_keys: no two lists of a training run have the same, wherever they are computed.
        width: K.

    Source: ours.
    """
    return _mix(list_keys)[:, None] + torch.arange(width, device=list_keys.device)


def _gumbel(keys: Int[Tensor, "B K"], samples: int, seed: int) -> Float[Tensor, "B N K"]:
    """Gumbel noise, float64, from a hash of the seed, the completion's key and the sample."""
    draw = torch.arange(samples, device=keys.device)[None, :, None]
    bits = _mix(_mix(_mix(keys + _mix(torch.full_like(keys, seed))))[:, None, :] + draw)
    uniform = ((bits >> 12 & (2**52 - 1)).double() + 0.5) / 2**52
    return -torch.log(-torch.log(uniform))


def _mix(x: Int[Tensor, ...]) -> Int[Tensor, ...]:
    """splitmix64, elementwise."""
    x = x + _GOLDEN
    x = (x ^ (x >> 30 & (2**34 - 1))) * _MIX_1
    x = (x ^ (x >> 27 & (2**37 - 1))) * _MIX_2
    return x ^ (x >> 31 & (2**33 - 1))
