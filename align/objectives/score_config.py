"""The recipe's `score`, `regularizer` and `token_weights`; the formulas are in `scores` and `token_reg`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from align.section import Strict, named


class ReverseKL(Strict):
    """The link of DPO: identity."""

    name: Literal["reverse_kl"] = "reverse_kl"


class ForwardKL(Strict):
    """1 - e^{-u}."""

    name: Literal["forward_kl"] = "forward_kl"


class JensenShannon(Strict):
    """log 2 + log sigmoid(u)."""

    name: Literal["js"] = "js"


class AlphaDivergence(Strict):
    """(e^{(alpha - 1) u} - 1) / (alpha - 1)."""

    name: Literal["alpha"] = "alpha"
    alpha: float = 0.5
    """1 is reverse KL, 0 forward KL."""


Divergence = Annotated[ReverseKL | ForwardKL | JensenShannon | AlphaDivergence, Field(discriminator="name")]


class _AgainstReference(Strict):
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference; smaller lets the policy move further."""
    divergence: Divergence = ReverseKL()
    """Divergence from the reference that the score stands for; only for objectives of score differences."""


class LogRatio(_AgainstReference):
    """Log-ratio of policy and reference, summed over tokens (DPO, LiPO)."""

    name: Literal["log_ratio"] = "log_ratio"


class LogRatioMean(_AgainstReference):
    """The same per token."""

    name: Literal["log_ratio_mean"] = "log_ratio_mean"


class LengthDesensitised(_AgainstReference):
    """The same with less weight on tokens beyond the list's shortest completion (LD-DPO)."""

    name: Literal["length_desensitised"] = "length_desensitised"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of those tokens; 1 is `log_ratio`."""


class Likelihood(Strict):
    """Log-probability of the completion, no reference (CPO)."""

    name: Literal["likelihood"] = "likelihood"
    beta: PositiveFloat = 0.1
    """Scale."""


class LikelihoodMean(Strict):
    """Mean log-probability of a token, no reference (SimPO)."""

    name: Literal["likelihood_mean"] = "likelihood_mean"
    beta: PositiveFloat = 2.0
    """Scale."""
    length_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The sum is divided by this power of the length; Rescue takes 0.85 for sampled completions."""


ScoreConfig = Annotated[
    LogRatio | LogRatioMean | LengthDesensitised | Likelihood | LikelihoodMean,
    Field(discriminator="name"),
    named("log_ratio"),
]


REFERENCE_FREE = frozenset({"likelihood", "likelihood_mean"})


class TokenReg(Strict):
    """T-REG."""

    name: Literal["token_reg"] = "token_reg"
    alpha: Annotated[float, Field(ge=0)] = 0.25
    """Share of the regularizer; the paper takes 0.1 to 0.5, and below 2 no token's gradient changes its sign."""
    detach_weight: bool = True
    """Hold a pair's weight sigmoid(s_worse - s_better) constant in the backward pass."""
    static_weight: PositiveFloat | None = None
    """A constant in place of that weight (the paper's ablation)."""

    @model_validator(mode="after")
    def _weight_is_live(self) -> "TokenReg":
        if self.static_weight is not None and not self.detach_weight:
            raise ValueError("detach_weight: a static_weight has no gradient; remove one of the two")
        return self


class Tgdpo(Strict):
    """TGDPO: a token's log-ratio counts more where its reward goes with the completion's place in the list."""

    name: Literal["tgdpo"] = "tgdpo"
    alpha: Annotated[float, Field(ge=0)] = 0.5
    """Strength."""


class Column(Strict):
    """The rows' own `token_weights`."""

    name: Literal["column"] = "column"


TokenWeights = Annotated[Tgdpo | Column, Field(discriminator="name")]
