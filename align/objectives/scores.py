"""Score functions: what the policy thinks of a completion, in nats, from its per-token log-probabilities.

Every function takes (policy_logprobs, reference_logprobs, completion_mask, list_index) and gives one score per
completion. Positions where completion_mask is False may hold anything, even NaN. lp is the policy's log-probability of
a token, ref the reference's, T a completion's length in tokens (at least 1).
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

REVERSE_KL: Mapping[str, str | float] = {"name": "reverse_kl"}


def log_ratio(
    policy_logprobs: Float[Tensor, "N C"],
    reference_logprobs: Float[Tensor, "N C"] | None,
    completion_mask: Bool[Tensor, "N C"],
    list_index: Int[Tensor, " N"],
    *,
    beta: float = 0.1,
    divergence: Mapping[str, str | float] = REVERSE_KL,
) -> Float[Tensor, " N"]:
    """DPO's implicit reward: how much likelier the policy finds a completion than the reference does.

    s = beta * link(sum_t (lp_t - ref_t))

    Args:
        policy_logprobs: log p(token) under the policy, in nats.
        reference_logprobs: the same under the reference.
        completion_mask: True on a completion's own tokens.
        list_index: which list a completion belongs to; not used here.
        beta: strength of the pull to the reference.
        divergence: {name: reverse_kl | forward_kl | js} or {name: alpha, alpha: a}; the link, identity for reverse_kl.

    Returns:
        One score per completion; 0 for an empty one.

    Source: DPO, arXiv:2305.18290; the links: f-DPO, arXiv:2309.16240.
    """
    del list_index
    return beta * _link(_ratios(policy_logprobs, reference_logprobs, completion_mask).sum(dim=1), divergence)


def log_ratio_mean(
    policy_logprobs: Float[Tensor, "N C"],
    reference_logprobs: Float[Tensor, "N C"] | None,
    completion_mask: Bool[Tensor, "N C"],
    list_index: Int[Tensor, " N"],
    *,
    beta: float = 0.1,
    divergence: Mapping[str, str | float] = REVERSE_KL,
) -> Float[Tensor, " N"]:
    """The log-ratio per token, so that long completions do not score higher for their length.

    s = beta / T * link(sum_t (lp_t - ref_t))

    Args:
        policy_logprobs: log p(token) under the policy, in nats.
        reference_logprobs: the same under the reference.
        completion_mask: True on a completion's own tokens.
        list_index: which list a completion belongs to; not used here.
        beta: strength of the pull to the reference.
        divergence: as for `log_ratio`; the link acts on the sum, before the division.

    Returns:
        One score per completion; 0 for an empty one.

    Source: TRL 1.16 (`ipo`, `sigmoid_norm`).
    """
    total = log_ratio(
        policy_logprobs, reference_logprobs, completion_mask, list_index, beta=beta, divergence=divergence
    )
    return total / _lengths(completion_mask)


def length_desensitised(
    policy_logprobs: Float[Tensor, "N C"],
    reference_logprobs: Float[Tensor, "N C"] | None,
    completion_mask: Bool[Tensor, "N C"],
    list_index: Int[Tensor, " N"],
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    divergence: Mapping[str, str | float] = REVERSE_KL,
) -> Float[Tensor, " N"]:
    """LD-DPO: tokens beyond the length that all completions of the list reach count less.

    s = beta * link(sum_{t <= L} (lp_t - ref_t) + alpha * sum_{t > L} (lp_t - ref_t)),  L = shortest length of the list

    Args:
        policy_logprobs: log p(token) under the policy, in nats.
        reference_logprobs: the same under the reference.
        completion_mask: True on a completion's own tokens.
        list_index: which list a completion belongs to.
        beta: strength of the pull to the reference.
        alpha: weight of the tokens beyond L; 1 is `log_ratio`.
        divergence: as for `log_ratio`.

    Returns:
        One score per completion; 0 for an empty one.

    Source: LD-DPO, arXiv:2409.06411, as in TRL 1.16 (`ld_alpha`); L for lists of more than two: ours.
    """
    lengths = completion_mask.sum(dim=1)
    same_list = list_index[:, None] == list_index[None, :]
    shared = torch.where(same_list, lengths[None, :], completion_mask.shape[1]).amin(dim=1)
    ratios = _ratios(policy_logprobs, reference_logprobs, completion_mask)
    beyond = completion_mask.cumsum(dim=1) > shared[:, None]
    return beta * _link(torch.where(beyond, alpha * ratios, ratios).sum(dim=1), divergence)


def likelihood(
    policy_logprobs: Float[Tensor, "N C"],
    reference_logprobs: Float[Tensor, "N C"] | None,
    completion_mask: Bool[Tensor, "N C"],
    list_index: Int[Tensor, " N"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " N"]:
    """CPO's score: the log-probability of the completion, without a reference.

    s = beta * sum_t lp_t

    Args:
        policy_logprobs: log p(token) under the policy, in nats.
        reference_logprobs: not used.
        completion_mask: True on a completion's own tokens.
        list_index: not used.
        beta: scale.

    Returns:
        One score per completion; 0 for an empty one.

    Source: CPO, arXiv:2401.08417.
    """
    del reference_logprobs, list_index
    return beta * policy_logprobs.masked_fill(~completion_mask, 0).sum(dim=1)


def likelihood_mean(
    policy_logprobs: Float[Tensor, "N C"],
    reference_logprobs: Float[Tensor, "N C"] | None,
    completion_mask: Bool[Tensor, "N C"],
    list_index: Int[Tensor, " N"],
    *,
    beta: float = 2.0,
    length_power: float = 1.0,
) -> Float[Tensor, " N"]:
    """SimPO's score: the mean log-probability of a token, without a reference.

    s = beta / T^length_power * sum_t lp_t

    Args:
        policy_logprobs: log p(token) under the policy, in nats.
        reference_logprobs: not used.
        completion_mask: True on a completion's own tokens.
        list_index: not used.
        beta: scale; SimPO takes 2 to 10, ORPO, RRHF, AFT and a plain likelihood term 1.
        length_power: 1 is the mean; Rescue takes 0.85 for sampled completions.

    Returns:
        One score per completion; 0 for an empty one.

    Source: SimPO, arXiv:2405.14734; the power: Rescue, arXiv:2311.09136 (authors' code).
    """
    total = likelihood(policy_logprobs, reference_logprobs, completion_mask, list_index, beta=beta)
    return total / _lengths(completion_mask) ** length_power


def _ratios(
    policy: Float[Tensor, "N C"], reference: Float[Tensor, "N C"] | None, mask: Bool[Tensor, "N C"]
) -> Float[Tensor, "N C"]:
    """lp_t - ref_t per token, before any sum: the sums are large and nearly equal, their difference is small."""
    if reference is None:
        raise ValueError("this score compares with a reference; give reference_logprobs or use a score without one")
    return (policy - reference).masked_fill(~mask, 0)


def _lengths(mask: Bool[Tensor, "N C"]) -> Int[Tensor, " N"]:
    return mask.sum(dim=1).clamp(min=1)


def _link(u: Float[Tensor, " N"], divergence: Mapping[str, str | float]) -> Float[Tensor, " N"]:
    options = {key: value for key, value in divergence.items() if key != "name"}
    return LINKS[str(divergence["name"])](u, **options)


def _reverse_kl(u: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return u


def _forward_kl(u: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return 1 - _capped_exp(-u)


def _js(u: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return math.log(2) + F.logsigmoid(u)


def _alpha(u: Float[Tensor, " N"], alpha: float) -> Float[Tensor, " N"]:
    if abs(alpha - 1) < 1e-6:
        return u
    return (_capped_exp((alpha - 1) * u) - 1) / (alpha - 1)


def _capped_exp(x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """e^x with the exponent held where the result can still be represented."""
    return x.clamp(max=11.0 if x.dtype == torch.float16 else 80.0).exp()


LINKS: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}


SCORES: dict[str, Callable[..., Tensor]] = {
    "log_ratio": log_ratio,
    "log_ratio_mean": log_ratio_mean,
    "length_desensitised": length_desensitised,
    "likelihood": likelihood,
    "likelihood_mean": likelihood_mean,
}
