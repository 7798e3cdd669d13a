"""Losses on a reward head's outputs: pairs of a list by Bradley-Terry or fidelity, attributes by regression.

Rewards r are [B, K], larger is better; grades order a list's completions (a tie forms no pair); list_mask False marks
padding, whose reward and grade may hold anything. Every loss is one value per list, so that a list counts the same
whatever its length and whatever stands beside it in a batch.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from rewards.head_config import Strength

LEVELS = 5
"""Levels of the soft bins: ratings are put on 1 .. LEVELS."""


def bradley_terry(
    rewards: Float[Tensor, "B K"],
    grades: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    strengths: Float[Tensor, " B"],
    *,
    strength: Strength = "none",
    center: float = 0.0,
) -> Float[Tensor, " B"]:
    """Negative log-likelihood of the preferences, its mean over a list's ordered pairs.

    none: -log sigmoid(d);  margin: -log sigmoid(d - m);  scaled: -m log sigmoid(d);  d = r_i - r_j
    plus center * (r_i + r_j)^2

    Args:
        rewards, grades, list_mask: see the module.
        strengths: m of a list's pairs; NaN where the row states none, and the gap of the grades is taken.
        strength: what is done with m. A pair of strength 0 states no preference and counts in no form.
        center: weight of the term that keeps the rewards' mean near 0.

    Returns:
        One loss per list, in nats; 0 with zero gradient for a list of ties.

    Source: HelpSteer2-Preference, arXiv:2410.01257, section 3; centring: arXiv:2312.09244, as in TRL 1.16; the mean
    over pairs of longer lists: InstructGPT, arXiv:2203.02155, eq. 1.
    """
    pairs, m = _pairs(grades, list_mask, strengths)
    d, m = _differences(rewards).masked_fill(~pairs, 0), m.to(rewards.dtype)
    losses = -F.logsigmoid(d - m if strength == "margin" else d)
    if strength == "scaled":
        losses = losses * m
    if center:
        sums = (rewards[:, :, None] + rewards[:, None, :]).masked_fill(~pairs, 0)
        losses = losses + center * sums.square()
    return _mean(losses, pairs)


def fidelity(
    rewards: Float[Tensor, "B K"],
    ratings: Float[Tensor, "B K"],
    list_mask: Bool[Tensor, "B K"],
    *,
    deviation: Float[Tensor, "B K"] | float = 1.0,
) -> Float[Tensor, " B"]:
    """Thurstone's pair probabilities of the raters against those of the model, its mean over a list's pairs i < j.

    1 - sqrt(P Q) - sqrt((1 - P)(1 - Q)),  P = Phi((y_i - y_j) / sqrt(s_i^2 + s_j^2)),  Q = Phi((r_i - r_j) / sqrt 2)

    Args:
        rewards, list_mask: see the module.
        ratings: y, in the rewards' unit; NaN where nothing is known.
        deviation: s, how far raters differ about each completion, in the ratings' unit; anything where one is missing.

    Returns:
        One loss per list, in [0, 1]; 0 for a list without two rated completions.

    Source: DeQA, arXiv:2501.11561 (authors' code: 1e-8 under the roots).
    """
    known = list_mask & ~ratings.isnan()
    pairs = (known[:, :, None] & known[:, None, :]).triu(diagonal=1)
    s = torch.as_tensor(deviation, dtype=ratings.dtype, device=ratings.device).expand_as(ratings)
    spread = (s[:, :, None].square() + s[:, None, :].square()).masked_fill(~pairs, 2).sqrt().clamp(min=1e-6)
    p = torch.special.ndtr(_differences(ratings).masked_fill(~pairs, 0) / spread)
    q = _phi(_differences(rewards).masked_fill(~pairs, 0))
    agreement = (p * q + 1e-8).sqrt() + ((1 - p) * (1 - q) + 1e-8).sqrt()
    return _mean(1 - agreement, pairs)


def squared_error(
    predicted: Float[Tensor, "B K A"], ratings: Float[Tensor, "B K A"], known: Bool[Tensor, "B K A"]
) -> Float[Tensor, " B"]:
    """Mean over a list's known ratings of (r - y)^2; 0 for a list without any.

    Args:
        predicted: the outputs of the attributes that are learnt.
        ratings: y; anything where `known` is False.
        known: False where a rating is missing, or is padding.

    Source: HelpSteer2, arXiv:2406.08673 (its code averages over the known ratings of a micro-batch; here every list
    counts the same, so the cut of a batch does not matter).
    """
    errors = (predicted - ratings.masked_fill(~known, 0)).masked_fill(~known, 0).square()
    return errors.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1)


def soft_bin_loss(
    predicted: Float[Tensor, "B K A"],
    ratings: Float[Tensor, "B K A"],
    known: Bool[Tensor, "B K A"],
    *,
    deviation: Float[Tensor, "B K A"] | float = 1.0,
) -> Float[Tensor, " B"]:
    """Mean over a list's known ratings of KL(p || q) on the levels 1 .. 5.

    p = soft_bins(y, deviation);  q(c) = Phi(c + 1/2 - r) - Phi(c - 1/2 - r), open at both ends

    Args:
        predicted, known: as for `squared_error`; an output stays one number, the mean of q's normal variable.
        ratings: y in [1, 5]; anything where `known` is False.
        deviation: how far raters differ about each completion, in levels; anything where `known` is False.

    Source: target: DeQA, arXiv:2501.11561; q: Thurstone's ordinal model with unit deviation in place of a softmax over
    level tokens, so that the head keeps one output per attribute (ours).
    """
    if isinstance(deviation, Tensor):
        deviation = deviation.masked_fill(~known, 1.0)
    p = soft_bins(ratings.masked_fill(~known, 3.0), deviation)
    levels = torch.arange(1, LEVELS, dtype=predicted.dtype, device=predicted.device)
    upper = (levels + 0.5 - predicted.masked_fill(~known, 3.0)[..., None]).double()
    log_q = _log_bins(upper).to(predicted.dtype)
    divergence = (torch.special.xlogy(p, p) - p * log_q).sum(-1).masked_fill(~known, 0)
    return divergence.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1)


def soft_bins(mean: Float[Tensor, "..."], deviation: Float[Tensor, "..."] | float) -> Float[Tensor, "... 5"]:
    """A distribution over the levels 1 .. 5 with this mean, near a normal density of this deviation.

    p = alpha p_raw + beta, cut at 0 and normalised;  A = sum p_raw, B = sum c p_raw, alpha = (mean - 3) / (B - 3 A),
    beta = (1 - alpha A) / 5; at mean 3 that is 0/0, and alpha = 1. Where the deviation is below 0.2 or the mean is off
    by more than 0.1: the two neighbouring levels in proportion.

    Args:
        mean: in [1, 5].
        deviation: in levels, of each mean or of all.

    Source: DeQA, arXiv:2501.11561 (authors' code); the guard at mean 3: ours.
    """
    levels = torch.arange(1, LEVELS + 1, dtype=mean.dtype, device=mean.device)
    two_points = (1 - (levels - mean[..., None]).abs()).clamp(min=0)
    deviation = torch.as_tensor(deviation, dtype=mean.dtype, device=mean.device).expand_as(mean)[..., None]
    narrow = deviation < 0.2
    deviation = deviation.masked_fill(narrow, 1.0)  # whose levels are not used
    raw = torch.exp(-0.5 * ((levels - mean[..., None]) / deviation).square()) / (deviation * (2 * torch.pi) ** 0.5)
    a, b = raw.sum(-1), (levels * raw).sum(-1)
    centred = (b - 3 * a).abs() < 1e-6
    alpha = torch.where(centred, 1.0, (mean - 3) / (b - 3 * a).masked_fill(centred, 1.0))
    p = (alpha[..., None] * raw + (1 - alpha * a)[..., None] / LEVELS).clamp(min=0)
    p = p / p.sum(-1, keepdim=True)
    off = ((levels * p).sum(-1) - mean).abs() > 0.1
    return torch.where(off[..., None] | narrow, two_points, p)


def min_norm_weights(gradients: Float[Tensor, "T P"], *, steps: int = 250) -> Float[Tensor, " T"]:
    """The point of the simplex where the weighted sum of the gradients is shortest (MGDA), by pairwise Frank-Wolfe.

    argmin over lambda >= 0, sum lambda = 1 of || sum_t lambda_t g_t ||^2

    Args:
        gradients: one row per preference set, scaled to comparable lengths; a row of zeros is a set without a gradient
            and keeps an even share.
        steps: at most, each with an exact line search between two sets; two sets need one.

    Source: MORE, arXiv:2312.07401; MGDA, arXiv:1810.04650, algorithm 2.
    """
    shares = torch.full_like(gradients[:, 0], 1 / len(gradients))
    seen = gradients.abs().sum(1) > 0
    if not seen.any():
        return shares
    gram = gradients[seen].double() @ gradients[seen].double().T
    weights = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64, device=gram.device)
    for _ in range(steps):
        slopes = gram @ weights
        to, away = slopes.argmin(), slopes.masked_fill(weights <= 0, -torch.inf).argmax()
        gap = slopes[away] - slopes[to]
        if gap <= 1e-9:
            break
        curvature = gram[to, to] + gram[away, away] - 2 * gram[to, away]
        step = (gap / curvature).clamp(max=weights[away])
        weights[to] += step
        weights[away] -= step
    return shares.masked_scatter(seen, weights.to(gradients.dtype) * seen.sum() / len(gradients))


def _pairs(
    grades: Float[Tensor, "B K"], list_mask: Bool[Tensor, "B K"], strengths: Float[Tensor, " B"]
) -> tuple[Bool[Tensor, "B K K"], Float[Tensor, "B K K"]]:
    """The ordered pairs that state a preference, and how strong it is."""
    gaps = _differences(grades)
    pairs = list_mask[:, :, None] & list_mask[:, None, :] & (gaps > 0) & (strengths != 0)[:, None, None]
    stated = ~strengths.isnan()[:, None, None]
    return pairs, torch.where(stated, strengths.nan_to_num()[:, None, None], gaps).masked_fill(~pairs, 0)


def _differences(x: Float[Tensor, "B K"]) -> Float[Tensor, "B K K"]:
    return x[:, :, None] - x[:, None, :]


def _mean(values: Float[Tensor, "B K K"], pairs: Bool[Tensor, "B K K"]) -> Float[Tensor, " B"]:
    return values.masked_fill(~pairs, 0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def _phi(difference: Tensor) -> Tensor:
    """Probability that one of two normal variables of unit deviation, so far apart, is the larger."""
    return torch.special.ndtr(difference / 2**0.5)


def _log_bins(upper: Float[Tensor, "... 4"]) -> Float[Tensor, "... 5"]:
    """log of the normal probabilities between the upper borders; each bin is taken on the side where it is exact."""
    low = torch.cat([torch.full_like(upper[..., :1], -torch.inf), upper], -1)
    high = torch.cat([upper, torch.full_like(upper[..., :1], torch.inf)], -1)
    flip = low > 0  # both borders right of the mean: the same bin, mirrored
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    # An open lower border adds nothing, and its infinite logarithm must not meet a gradient.
    ratio = (log_low - log_high).masked_fill(low == -torch.inf, -1e3)
    return log_high + torch.log1p(-ratio.exp())
