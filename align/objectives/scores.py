"""Score functions: what the policy thinks of a completion, in nats, from its per-token log-probabilities.

Every function takes (policy_logprobs, reference_logprobs, completion_mask, list_index) and gives one score per
completion. Positions where completion_mask is False may hold anything, even NaN. lp is the policy's log-probability of
a token, ref the reference's, T a completion's length in learnt tokens (at least 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, PositiveFloat

from align.objectives.base import SCORE, Score
from align.objectives.divergence import Divergence, ReverseKL, link
from align.own_code import load_function, names_a_function, own_options
from align.section import Named
from align.tensors import Bool, Float, Int, Tensor, torch

REVERSE_KL: Mapping[str, str | float] = {"name": "reverse_kl"}


class _AgainstReference(Score):
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference; smaller lets the policy move further."""
    divergence: Divergence = ReverseKL()
    """Divergence from the reference that the score stands for; only for objectives of score differences."""


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
    return beta * link(_ratios(policy_logprobs, reference_logprobs, completion_mask).sum(dim=1), divergence)


@SCORE.add
class LogRatio(_AgainstReference):
    """Log-ratio of policy and reference, summed over tokens (DPO, LiPO)."""

    formula = staticmethod(log_ratio)

    name: Literal["log_ratio"] = "log_ratio"


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


@SCORE.add
class LogRatioMean(_AgainstReference):
    """The same per token."""

    formula = staticmethod(log_ratio_mean)

    name: Literal["log_ratio_mean"] = "log_ratio_mean"


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
    return beta * link(torch.where(beyond, alpha * ratios, ratios).sum(dim=1), divergence)


@SCORE.add
class LengthDesensitised(_AgainstReference):
    """The same with less weight on tokens beyond the list's shortest completion (LD-DPO)."""

    formula = staticmethod(length_desensitised)

    name: Literal["length_desensitised"] = "length_desensitised"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of those tokens; 1 is `log_ratio`."""


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


@SCORE.add
class Likelihood(Score):
    """Log-probability of the completion, no reference (CPO)."""

    formula = staticmethod(likelihood)
    against_reference = False

    name: Literal["likelihood"] = "likelihood"
    beta: PositiveFloat = 0.1
    """Scale."""


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


@SCORE.add
class LikelihoodMean(Score):
    """Mean log-probability of a token, no reference (SimPO)."""

    formula = staticmethod(likelihood_mean)
    against_reference = False

    name: Literal["likelihood_mean"] = "likelihood_mean"
    beta: PositiveFloat = 2.0
    """Scale."""
    length_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The sum is divided by this power of the length; Rescue takes 0.85 for sampled completions."""


def _ratios(
    policy: Float[Tensor, "N C"], reference: Float[Tensor, "N C"] | None, mask: Bool[Tensor, "N C"]
) -> Float[Tensor, "N C"]:
    """lp_t - ref_t per token, before any sum: the sums are large and nearly equal, their difference is small."""
    if reference is None:
        raise ValueError("this score compares with a reference; give reference_logprobs or use a score without one")
    return (policy - reference).masked_fill(~mask, 0)


def _lengths(mask: Bool[Tensor, "N C"]) -> Int[Tensor, " N"]:
    return mask.sum(dim=1).clamp(min=1)


class OwnScore(Score):
    """A function of your own file, held to the contract before training; its other keys are the function's keywords."""

    model_config = ConfigDict(extra="allow")

    name: Literal["python"] = "python"
    function: Annotated[str, AfterValidator(names_a_function)]
    """`file.py:function`, from the current folder; training runs that file's code."""
    beta: PositiveFloat = 0.1
    """Scale of the scores, for objectives that divide it out; the function gets it where it takes a `beta`."""
    reference: bool = True
    """Whether it compares with the reference; if not, the reference is not computed, and None for the function."""

    def load(self) -> Callable[..., Any]:
        """The function, checked.

        Raises:
            UserError: there is none, or it breaks the contract of a score.
        """
        from align.objectives.contract import check_score_function, keywords  # once it is asked for

        function = load_function(self.function)
        beta = {"beta": self.beta} if "beta" in keywords(function) else {}

        def score(policy: Tensor, reference: Tensor | None, mask: Tensor, lists: Tensor, **options: Any) -> Tensor:
            return function(policy, reference if self.reference else None, mask, lists, **beta, **options)

        check_score_function(score, self.function, self.options())
        return score

    def options(self) -> dict[str, Any]:
        """The keys that are not ours, and those below `options`."""
        return own_options(self.model_extra)

    @property
    def needs_reference(self) -> bool:
        """See `reference`."""
        return self.reference


if TYPE_CHECKING:
    ScoreConfig = Score
else:
    ScoreConfig = Annotated[SCORE.union(OwnScore), Named("log_ratio")]
    """Any score's section, for use as a pydantic field."""
