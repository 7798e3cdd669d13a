"""Changes to scores and losses that go with any objective: WPO's weights and DPOP's penalty."""

from __future__ import annotations

from align.objectives.lists import chosen_and_rejected, masked_mean
from align.tensors import Bool, Float, Tensor


def wpo_weights(
    policy_logprobs: Float[Tensor, "N C"],
    log_sum_sq_probs: Float[Tensor, "N C"],
    completion_mask: Bool[Tensor, "N C"],
) -> Float[Tensor, " N"]:
    """WPO: how likely the policy finds a completion, aligned so that a sampled one has about the same as any other.

    u = mean over t of (lp_t - log sum_v p_v^2), constant in the backward pass

    Args:
        policy_logprobs: lp, log p(token) under the policy, in nats.
        log_sum_sq_probs: log of the sum over the vocabulary of squared probabilities, in nats.
        completion_mask: True on a completion's own tokens; elsewhere anything, even NaN.

    Returns:
        One log-weight u per completion, in nats; 0 for an empty one.

    Source: WPO, arXiv:2406.11827, eq. 2, with the alignment of its section 3.3.
    """
    aligned = (policy_logprobs - log_sum_sq_probs).detach()
    return masked_mean(aligned, completion_mask)


def wpo_list_weights(
    log_weights: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"], *, clamp: bool = True
) -> Float[Tensor, " B"]:
    """WPO's weight of a list, which multiplies its loss.

    w = e^{2 mean_i u_i}, at most 1 with clamp; on two e^{u_1 + u_2}

    On longer lists this is the geometric mean, over pairs, of the pair's weight, so that it does not fade with K.

    Args:
        log_weights: u per completion, in nats.
        list_mask: False marks padding, which may hold anything.
        clamp: hold the weight at 1, as the authors do; TRL does not.

    Returns:
        One weight per list.

    Source: WPO, arXiv:2406.11827, eq. 2; K > 2: ours.
    """
    weights = (2 * masked_mean(log_weights, list_mask)).exp()
    return weights.clamp(max=1.0) if clamp else weights


def dpop_penalty(
    scores: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    strength: float,
    noise: Float[Tensor, "B K"] | float = 0.0,
) -> Float[Tensor, "B K"]:
    """DPOP: what to subtract from the scores so that the best completion does not fall below the reference.

    strength * max(0, -s) on the best-graded completions, 0 elsewhere; an objective then acts on scores - penalty

    With `logistic` on two that is -log sigmoid(d - beta * strength * max(0, -A)), A the unscaled log-ratio of the best.

    Args:
        scores: s in nats, beta included; of a score with a reference, else "below" has no meaning.
        grades: larger is better; nothing is penalised in a list of ties.
        list_mask: False marks padding, which may hold anything.
        strength: lambda of the paper, which takes 5 to 50.
        noise: how far each score may be off by rounding; a fall of no more is none, as before the first step.

    Returns:
        The penalty of each completion, in nats; gradients flow through it.

    Source: DPOP, arXiv:2402.13228 (published notes); lists of more than two: ours.
    """
    best, _ = chosen_and_rejected(grades, list_mask)
    fell = best & (-scores.detach() > noise)
    return strength * -scores.masked_fill(~fell, 0)
