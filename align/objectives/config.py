"""The recipe's `objective`: every objective's name and options; the formulas are in the modules beside."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from align.objectives.score_config import LikelihoodMean, ScoreConfig
from align.section import Strict


class Objective(Strict):
    """Keys that every objective has."""

    weight: PositiveFloat = 1.0
    """Factor in the sum where several objectives are combined."""
    score: ScoreConfig | None = None
    """A score function of its own; by default the recipe's."""


class Logistic(Objective):
    """DPO, cDPO, SimPO; over all ordered pairs of a list."""

    name: Literal["logistic"] = "logistic"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference is flipped."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """How far apart scores should be (SimPO's gamma)."""


class Robust(Objective):
    """Robust DPO for flipped preferences."""

    name: Literal["robust"] = "robust"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of flipped preferences."""


class Hinge(Objective):
    """SLiC's hinge."""

    name: Literal["hinge"] = "hinge"


class Squared(Objective):
    """IPO."""

    name: Literal["squared"] = "squared"


class Exo(Objective):
    """EXO on ordered pairs."""

    name: Literal["exo"] = "exo"
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Probability that a preference is flipped; 0 would make the loss infinite."""


class Discopop(Objective):
    """DiscoPOP."""

    name: Literal["discopop"] = "discopop"
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.05
    """How sharply the blend of the two losses changes."""


class OddsRatio(Objective):
    """ORPO's odds-ratio term; combine it with `sft`."""

    name: Literal["odds_ratio"] = "odds_ratio"
    score: LikelihoodMean = LikelihoodMean(beta=1.0)
    """Odds are those of the mean token probability."""


class PartialOrder(Objective):
    """Rescue and RRHF; combine it with `sft`."""

    name: Literal["partial_order"] = "partial_order"
    score: ScoreConfig | None = LikelihoodMean(beta=1.0)
    """Mean log-probability, as in both papers (Rescue: `length_power: 0.85`); null takes the recipe's score."""


class PointwiseMse(Objective):
    """Squared error against the grades."""

    name: Literal["pointwise_mse"] = "pointwise_mse"


class PointwiseSigmoid(Objective):
    """Cross-entropy against the grades as probabilities."""

    name: Literal["pointwise_sigmoid"] = "pointwise_sigmoid"


class Kto(Objective):
    """KTO, for completions that are good or bad by themselves."""

    name: Literal["kto"] = "kto"
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable completions."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable completions."""


class ApoZeroUnpaired(Objective):
    """APO-zero for single completions."""

    name: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable completions."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable completions."""


class Sft(Objective):
    """Next-token loss of the best completion, beside another objective (RPO)."""

    name: Literal["sft"] = "sft"
    ties: Literal["mean", "first"] = "mean"
    """Several best completions: their mean, or the first of the row (RRHF and Rescue)."""
    score: ScoreConfig | None = LikelihoodMean(beta=1.0)
    """Mean log-probability of a token; null takes the recipe's score."""


class Nca(Objective):
    """NCA."""

    name: Literal["nca"] = "nca"
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the target weights softmax(grades / temperature); 0 gives all weight to the best grade."""


class Bco(Objective):
    """BCO without the running shift of the reward."""

    name: Literal["bco"] = "bco"


class Sppo(Objective):
    """SPPO; grades are win probabilities."""

    name: Literal["sppo"] = "sppo"


class ApoZero(Objective):
    """APO-zero."""

    name: Literal["apo_zero"] = "apo_zero"


class ApoDown(Objective):
    """APO-down; pairs only."""

    name: Literal["apo_down"] = "apo_down"


class ListMle(Objective):
    """Plackett-Luce likelihood of the order."""

    name: Literal["list_mle"] = "list_mle"


class Softmax(Objective):
    """Cross-entropy of the normalised grades (ListNet, InfoNCA)."""

    name: Literal["softmax"] = "softmax"


class ExoList(Objective):
    """Reverse KL to the softmax of the grades."""

    name: Literal["exo_list"] = "exo_list"
    temperature: PositiveFloat = 1.0
    """Of the target softmax(grades / temperature); smaller trusts the grades more."""


Reduction = Literal["list_sum", "list_mean", "pair_mean"]


class Lambda(Objective):
    """LiPO-lambda."""

    name: Literal["lambda"] = "lambda"
    log_base: Annotated[float, Field(gt=1)] = 2.0
    """Of the rank discount."""
    reduction: Reduction = "list_sum"
    """Sum over a list's pairs, or that per completion, or per ordered pair."""


Variant = Literal["plain", "detached", "boundary", "ranking"]


class Aft(Objective):
    """AFT's alignment term."""

    name: Literal["aft"] = "aft"
    variant: Variant = "ranking"
    """`plain`, or one of three ways to keep the worse completions from falling without end."""
    margin: PositiveFloat = 0.1
    """How far a worse completion is pushed below the better one, in nats per token; `boundary` and `ranking` only."""
    score: ScoreConfig | None = LikelihoodMean(beta=1.0)
    """Mean log-probability of a token; null takes the recipe's score."""

    @model_validator(mode="after")
    def _margin_counts(self) -> "Aft":
        if self.margin != 0.1 and self.variant in ("plain", "detached"):
            raise ValueError(f"margin: `{self.variant}` has none; remove it, or take `boundary` or `ranking`")
        return self


class PlPolicyGradient(Objective):
    """Neural PG-RANK."""

    name: Literal["pl_policy_gradient"] = "pl_policy_gradient"
    samples: Annotated[int, Field(ge=2)] = 16
    """Rankings drawn per list and step."""
    cutoff: Annotated[int, Field(ge=1)] | None = None
    """Reward only this many first ranks (NDCG@k)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws."""


ObjectiveConfig = Annotated[
    Aft
    | ApoDown
    | ApoZero
    | ApoZeroUnpaired
    | Bco
    | Discopop
    | Exo
    | ExoList
    | Hinge
    | Kto
    | Lambda
    | ListMle
    | Logistic
    | Nca
    | OddsRatio
    | PartialOrder
    | PlPolicyGradient
    | PointwiseMse
    | PointwiseSigmoid
    | Robust
    | Sft
    | Softmax
    | Sppo
    | Squared,
    Field(discriminator="name"),
]
