"""How a policy is trained: each adapter is one class, which says what PEFT makes of it and what it goes with."""

import math
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from align.errors import UserError
from align.model.adapter import ADAPTER, Adapter, InLayers, Targets, as_peft
from align.model.middle_adapters import MIDDLES
from align.model.peft_adapter import Peft
from align.section import Fraction, Named, Strict

if TYPE_CHECKING:
    import peft


class LowRank(InLayers):
    averages: ClassVar = True
    rank: PositiveInt = 16
    """Width of the two factors of a layer's update."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: Fraction = 0.0
    """Share of a layer's inputs that the adapter does not see in a training step."""
    targets: Targets = "all-linear"
    """Names of the layers it acts on, `lm_head` among them if you like; `all-linear`: every linear layer but that."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Ranks of some layers, by the end of their names or a regular expression: `{down_proj: 32}`."""
    alpha_pattern: dict[str, PositiveInt] = {}
    """Alphas of some layers, likewise."""

    def variant(self) -> dict[str, Any]:
        """What PEFT's LoraConfig is told besides the keys that all of them have."""
        return {}

    def peft(self, *, total_steps: int | None) -> "peft.PeftConfig":
        import peft

        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=as_peft(self.targets),
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            **self.variant(),
        )

    def served_rank(self) -> int | None:
        return self.largest_rank

    @property
    def largest_rank(self) -> int:
        """Of all layers."""
        return max(self.rank, *self.rank_pattern.values(), 0)


class Ranks(Strict):
    """Ranks of a LoRA's layers by what the first 256 lists show; on average they are `rank`, at least 1."""

    name: Literal["sensitivity", "variance"]
    """`sensitivity`: ranks go where the loss's gradient by the weights has its largest singular values, so that they
    hold most of its squared norm; `variance`: where the layers' inputs have most of their sum of squares."""
    most: Annotated[float, Field(ge=1)] = 2.0
    """A layer gets at most this times `rank`."""


class Sized(LowRank):
    """A LoRA whose ranks may follow the rows."""

    ranks: Annotated[Ranks, Named("sensitivity")] | None = None
    """How the layers share the ranks out: `sensitivity` or `variance`; by default alike, `rank` each."""

    @model_validator(mode="after")
    def _one_way_of_ranks(self) -> "Sized":
        if self.ranks is not None and (self.rank_pattern or self.alpha_pattern):
            raise ValueError("`ranks` gives every layer a rank and an alpha of its own; remove the patterns")
        return self

    def reads_rows(self) -> bool:
        return self.ranks is not None

    def check_quantization(self, quantization: str | None) -> None:
        super().check_quantization(quantization)
        if quantization is not None and self.ranks is not None and self.ranks.name == "sensitivity":
            raise UserError(
                "policy.adapter.ranks: sensitivity needs the gradient of the weights, which quantised ones lack; take "
                "variance"
            )

    @property
    def largest_rank(self) -> int:
        """Of all layers."""
        return super().largest_rank if self.ranks is None else int(self.ranks.most * self.rank)


class Decomposed(LowRank):
    """A LoRA whose start is taken out of the weights."""

    mutates_base: ClassVar = True
    moved_start: ClassVar = True
    references: ClassVar = ("initial",)

    def served_rank(self) -> int | None:
        return 2 * self.largest_rank  # the difference to its start


@ADAPTER.add
class Lora(Sized):
    """W + (alpha / rank) B A with B = 0 at first.

    Source: arXiv:2106.09685.
    """

    name: Literal["lora"] = "lora"


@ADAPTER.add
class RsLora(Sized):
    """LoRA scaled by alpha / sqrt(rank), so that the update's size does not shrink with the rank.

    Source: arXiv:2312.03732.
    """

    name: Literal["rslora"] = "rslora"

    def variant(self) -> dict[str, Any]:
        return {"use_rslora": True}


@ADAPTER.add
class Dora(Sized):
    """LoRA on the direction of every weight row, with a length of its own.

    Source: arXiv:2402.09353.
    """

    averages: ClassVar = False
    name: Literal["dora"] = "dora"

    def variant(self) -> dict[str, Any]:
        return {"use_dora": True}

    def served_rank(self) -> int | None:
        return None


@ADAPTER.add
class Pissa(Decomposed):
    """LoRA that starts from the weight's leading singular vectors and leaves the rest of it frozen.

    Source: arXiv:2404.02948.
    """

    name: Literal["pissa"] = "pissa"
    iterations: PositiveInt | None = None
    """Subspace iterations of a fast approximate SVD (16 is usual for large models); by default the exact one."""

    def variant(self) -> dict[str, Any]:
        return {"init_lora_weights": "pissa" if self.iterations is None else f"pissa_niter_{self.iterations}"}


@ADAPTER.add
class Olora(Decomposed):
    """LoRA that starts from the weight's QR decomposition and leaves the rest of it frozen.

    Source: arXiv:2406.01775.
    """

    name: Literal["olora"] = "olora"

    def variant(self) -> dict[str, Any]:
        return {"init_lora_weights": "olora"}


@ADAPTER.add
class Eva(LowRank):
    """LoRA whose A holds the leading directions of a layer's inputs on training rows; ranks follow their variance.

    Source: arXiv:2410.07170.
    """

    from_rows: ClassVar = True
    start: ClassVar = "starts:eva"
    name: Literal["eva"] = "eva"
    rho: Annotated[float, Field(ge=1)] = 2.0
    """A layer gets at most rho * rank."""

    @model_validator(mode="after")
    def _chooses_ranks(self) -> "Eva":
        if self.rank_pattern or self.alpha_pattern:
            raise ValueError("eva gives every layer a rank and an alpha of its own; remove the patterns")
        return self

    def variant(self) -> dict[str, Any]:
        import peft

        return {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=self.rho)}

    def served_rank(self) -> int | None:
        return math.ceil(self.rho * self.rank)


@ADAPTER.add
class Loftq(LowRank):
    """LoRA that starts from what 4-bit quantisation lost; needs `policy.quantization: 4bit`.

    Source: arXiv:2310.08659.
    """

    moved_start: ClassVar = True
    needs_quantization: ClassVar = True
    references: ClassVar = ("initial",)
    start: ClassVar = "starts:loftq"
    name: Literal["loftq"] = "loftq"


@ADAPTER.add
class AdaLora(InLayers):
    """An SVD-like update whose rank is moved, while training, to the layers that need it.

    Source: arXiv:2303.10512.
    """

    needs_steps: ClassVar = True
    references: ClassVar = ("initial",)
    name: Literal["adalora"] = "adalora"
    rank: PositiveInt = 8
    """Mean rank of a layer at the end."""
    initial_rank: PositiveInt = 12
    """Rank of every layer at the start."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / initial_rank."""
    dropout: Fraction = 0.0
    """Share of a layer's inputs that the adapter does not see in a training step."""
    warmup: Fraction = 0.1
    """Share of the steps before ranks begin to fall."""
    settle: Fraction = 0.2
    """Share of the steps, at the end, in which ranks stay as they are."""
    interval: PositiveInt = 1
    """Steps between two allocations."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the penalty that keeps the factors orthogonal."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> "AdaLora":
        if self.rank >= self.initial_rank:
            raise ValueError(f"rank {self.rank} must be below initial_rank {self.initial_rank}: ranks only fall")
        if self.warmup + self.settle >= 1:
            raise ValueError("warmup + settle must leave steps in which ranks fall")
        return self

    def peft(self, *, total_steps: int | None) -> "peft.PeftConfig":
        import peft

        if total_steps is None:
            raise ValueError("adalora needs the number of steps of the run")
        return peft.AdaLoraConfig(
            task_type="CAUSAL_LM",
            target_r=self.rank,
            init_r=self.initial_rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=as_peft(self.targets),
            tinit=int(self.warmup * total_steps),
            tfinal=int(self.settle * total_steps),
            deltaT=self.interval,
            orth_reg_weight=self.orthogonality,
            total_step=total_steps,
        )

    def check_steps(self, steps: int) -> None:
        if steps - int(self.settle * steps) > 1:
            return
        needed = next(n for n in count(2) if n - int(self.settle * n) > 1)
        raise UserError(
            f"policy.adapter: adalora settles on its ranks by the gradients of earlier steps, and a run of {steps} has "
            f"none; train {needed} steps or more, lower `settle`, or take lora"
        )


@ADAPTER.add
class Miss(InLayers):
    """MiSS (Bone): one block, shared between the shards of a weight, is added to it.

    Source: arXiv:2409.15371.
    """

    name: Literal["miss"] = "miss"
    rank: PositiveInt = 64
    """Width of the block; even."""
    dropout: Fraction = 0.0
    """Share of a layer's inputs that the adapter does not see in a training step."""
    variant: Literal["balance", "bat", "mini"] = "balance"
    """`bat`: the update also depends on the weight (Bone's); `mini`: fewer parameters."""
    mini_rank: NonNegativeInt = 1
    """Width of the block along the outputs, for `mini`; divides a layer's outputs."""

    def peft(self, *, total_steps: int | None) -> "peft.PeftConfig":
        import peft

        return peft.MissConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            miss_dropout=self.dropout,
            target_modules=as_peft(self.targets),
            init_weights=True if self.variant == "balance" else self.variant,
            mini_r=self.mini_rank,
        )


@ADAPTER.add
class Ia3(InLayers):
    """IA3: a learnt factor for each key, value and feed-forward channel.

    Source: arXiv:2205.05638.
    """

    name: Literal["ia3"] = "ia3"
    targets: Targets | None = None
    """Names of the layers it acts on; by default PEFT's choice for the architecture."""
    feedforward: tuple[str, ...] = ()
    """Which of `targets` have their inputs scaled, not their outputs."""

    def peft(self, *, total_steps: int | None) -> "peft.PeftConfig":
        import peft

        if self.targets is None:
            return peft.IA3Config(task_type="CAUSAL_LM")
        return peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=as_peft(self.targets),
            feedforward_modules=list(self.feedforward),
        )


for one in (*MIDDLES, Peft):
    ADAPTER.add(one)


@ADAPTER.add
class Full(Adapter):
    """No adapter: every weight trains, and the reference is a copy of the model or cached."""

    averages: ClassVar = True
    references: ClassVar = ("initial", "previous")
    name: Literal["full"] = "full"

    def check_quantization(self, quantization: str | None) -> None:
        if quantization is not None:
            raise UserError("policy: quantised weights cannot train; set an adapter or remove `quantization`")


if TYPE_CHECKING:
    AdapterConfig = Adapter
else:
    AdapterConfig = Annotated[ADAPTER.union(), Named("lora")]

MUTATES_BASE = tuple(name for name, own in ADAPTER.classes.items() if own.mutates_base)
DIFFERENCES = tuple(name for name in MUTATES_BASE if getattr(ADAPTER.classes[name], "outer_trains", True))
"""Of these, those that are exported as a difference of two LoRAs; where A stays, the difference is one."""
