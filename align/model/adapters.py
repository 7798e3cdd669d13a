"""How a policy is trained: adapters by name; `peft_configs` says what PEFT makes of them."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from align.section import Fraction, Strict, named

Targets = Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)]


class LowRank(Strict):
    rank: PositiveInt = 16
    """Width of the two factors of a layer's update."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: Fraction = 0.0
    """Share of a layer's inputs that the adapter does not see in a training step."""
    targets: Targets = "all-linear"
    """Names of the layers it acts on, `lm_head` among them if you like; `all-linear`: every linear layer but that."""


class Lora(LowRank):
    """W + (alpha / rank) B A with B = 0 at first.

    Source: arXiv:2106.09685.
    """

    name: Literal["lora"] = "lora"


class RsLora(LowRank):
    """LoRA scaled by alpha / sqrt(rank), so that the update's size does not shrink with the rank.

    Source: arXiv:2312.03732.
    """

    name: Literal["rslora"] = "rslora"


class Dora(LowRank):
    """LoRA on the direction of every weight row, with a length of its own.

    Source: arXiv:2402.09353.
    """

    name: Literal["dora"] = "dora"


class Pissa(LowRank):
    """LoRA that starts from the weight's leading singular vectors and leaves the rest of it frozen.

    Source: arXiv:2404.02948.
    """

    name: Literal["pissa"] = "pissa"
    iterations: PositiveInt | None = None
    """Subspace iterations of a fast approximate SVD (16 is usual for large models); by default the exact one."""


class Olora(LowRank):
    """LoRA that starts from the weight's QR decomposition and leaves the rest of it frozen.

    Source: arXiv:2406.01775.
    """

    name: Literal["olora"] = "olora"


class Eva(LowRank):
    """LoRA whose A holds the leading directions of a layer's inputs on training rows; ranks follow their variance.

    Source: arXiv:2410.07170.
    """

    name: Literal["eva"] = "eva"
    rho: Annotated[float, Field(ge=1)] = 2.0
    """A layer gets at most rho * rank."""


class Loftq(LowRank):
    """LoRA that starts from what 4-bit quantisation lost; needs `policy.quantization: 4bit`.

    Source: arXiv:2310.08659.
    """

    name: Literal["loftq"] = "loftq"


class AdaLora(Strict):
    """An SVD-like update whose rank is moved, while training, to the layers that need it.

    Source: arXiv:2303.10512.
    """

    name: Literal["adalora"] = "adalora"
    rank: PositiveInt = 8
    """Mean rank of a layer at the end."""
    initial_rank: PositiveInt = 12
    """Rank of every layer at the start."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / initial_rank."""
    dropout: Fraction = 0.0
    """Share of a layer's inputs that the adapter does not see in a training step."""
    targets: Targets = "all-linear"
    """Names of the layers it acts on."""
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


class Miss(Strict):
    """MiSS (Bone): one block, shared between the shards of a weight, is added to it.

    Source: arXiv:2409.15371.
    """

    name: Literal["miss"] = "miss"
    rank: PositiveInt = 64
    """Width of the block; even."""
    dropout: Fraction = 0.0
    """Share of a layer's inputs that the adapter does not see in a training step."""
    targets: Targets = "all-linear"
    """Names of the layers it acts on."""
    variant: Literal["balance", "bat", "mini"] = "balance"
    """`bat`: the update also depends on the weight (Bone's); `mini`: fewer parameters."""
    mini_rank: NonNegativeInt = 1
    """Width of the block along the outputs, for `mini`; divides a layer's outputs."""


class Ia3(Strict):
    """IA3: a learnt factor for each key, value and feed-forward channel.

    Source: arXiv:2205.05638.
    """

    name: Literal["ia3"] = "ia3"
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the layers it acts on; by default PEFT's choice for the architecture."""
    feedforward: tuple[str, ...] = ()
    """Which of `targets` have their inputs scaled, not their outputs."""


class Full(Strict):
    """No adapter: every weight trains, and the reference is a copy of the model or cached."""

    name: Literal["full"] = "full"


AdapterConfig = Annotated[
    Lora | RsLora | Dora | Pissa | Olora | Eva | Loftq | AdaLora | Miss | Ia3 | Full,
    Field(discriminator="name"),
    named("lora"),
]
PeftAdapter = Lora | RsLora | Dora | Pissa | Olora | Eva | Loftq | AdaLora | Miss | Ia3

MUTATES_BASE = ("pissa", "olora")
"""Adapters that take their start out of the base weights; saved as the difference to that start."""
MOVED_START = (*MUTATES_BASE, "loftq")
"""Adapters that do not start as the identity, so that the reference is a frozen copy of their start."""
