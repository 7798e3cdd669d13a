"""Adapters of which some factors are computed or drawn once; see `align.model.middle`."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from align.errors import UserError
from align.model.adapter import InLayers, as_peft
from align.section import Fraction

if TYPE_CHECKING:
    import peft


class Middle(InLayers):
    """W + B M A, scaled by 1."""

    references: ClassVar = ("initial",)
    start: ClassVar = "middle:start"
    decomposition: ClassVar[str] = "singular"
    """A function of `align.model.middle` that gives B, M and A of a matrix."""
    outer_trains: ClassVar[bool] = False
    """Whether B and A train as well."""
    rank: PositiveInt = 16
    """Width of the outer factors."""
    dropout: Fraction = 0.0
    """Share of a layer's inputs that the adapter does not see in a training step."""

    def peft(self, *, total_steps: int | None) -> "peft.PeftConfig":
        import peft

        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.rank,
            lora_dropout=self.dropout,
            target_modules=as_peft(self.targets),
        )

    def served_rank(self) -> int | None:
        return self.rank


class Taken(Middle):
    """Its start is taken out of the weight, so that the policy starts as the base."""

    mutates_base: ClassVar = True
    moved_start: ClassVar = True


class LoraSb(Middle):
    """LoRA between the leading directions of the loss's gradient: M alone trains.

    B and A hold the singular vectors of -sign(G), with G the gradient on the first lists, as the first step of Adam on
    the whole weight would be. M starts at 0, so that the policy starts as the base, or at `step` times the singular
    values, as in the paper; the reference is then a frozen copy of that.

    Source: arXiv:2411.19557.
    """

    from_rows: ClassVar = True
    name: Literal["lora_sb"] = "lora_sb"
    step: NonNegativeFloat = 0.0
    """Learning rate of the step that it starts with."""

    def moves_start(self) -> bool:
        return self.step > 0

    def check_quantization(self, quantization: str | None) -> None:
        if quantization is not None:
            raise UserError("policy: lora_sb needs the gradient of the weights, which quantised ones lack; use lora")


class Sorsa(Taken):
    """The weight's leading singular triplets train, held orthonormal by a penalty; the rest of it is frozen.

    Source: arXiv:2409.00055.
    """

    outer_trains: ClassVar = True
    name: Literal["sorsa"] = "sorsa"
    orthonormality: NonNegativeFloat = 10.0
    """Weight of the mean of all ||A A' - I||_F and ||B' B - I||_F: the paper's gamma over the learning rate."""

    def served_rank(self) -> int | None:
        return 2 * self.rank  # the difference to its start


class SvFit(Taken):
    """The weight's leading singular values train.

    Source: arXiv:2409.05926.
    """

    name: Literal["svfit"] = "svfit"


class NLora(Taken):
    """Columns and rows of the weight, and between them the inverse of the block where they cross, as Nystroem has it.

    Source: arXiv:2502.14482; the block's inverse is ours, where the authors' code starts with the block.
    """

    decomposition: ClassVar = "nystroem"
    outer_trains: ClassVar = True
    name: Literal["nlora"] = "nlora"

    def served_rank(self) -> int | None:
        return 2 * self.rank


class LoraLdu(Taken):
    """The first entries of D train, of the weight's decomposition P L D U.

    Source: arXiv:2410.13618.
    """

    decomposition: ClassVar = "lower_diagonal_upper"
    name: Literal["lora_ldu"] = "lora_ldu"


class S2ft(InLayers):
    """Columns of the weights train in place: those that read some heads, and some channels of the MLP.

    A LoRA whose A picks the columns, and whose B, which starts at 0, is what they change by. Which ones is drawn from
    the seed, as in the paper's S2FT-R.

    Source: arXiv:2412.06289.
    """

    references: ClassVar = ("initial",)
    start: ClassVar = "middle:columns"
    name: Literal["s2ft"] = "s2ft"
    targets: tuple[str, str] = ("o_proj", "down_proj")
    """Names of the layer that reads the heads and of the one that reads the MLP's channels."""
    heads: PositiveInt = 1
    """Of each layer's attention."""
    channels: PositiveInt = 64
    """Of each layer's MLP."""

    def peft(self, *, total_steps: int | None) -> "peft.PeftConfig":
        import peft

        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=self.channels, lora_alpha=self.channels, target_modules=as_peft(self.targets)
        )

    def served_rank(self) -> int | None:
        return max(self.channels, WIDEST_HEAD * self.heads)


class Lofit(InLayers):
    """An offset of what some attention heads give, before the layer that reads them.

    The heads are those of the whole model by whose offsets the loss's gradient on the first lists is largest, where the
    paper trains a factor for each of them first. What is exported is PEFT's BEFT, an offset of that layer's outputs.

    Source: arXiv:2406.01563.
    """

    references: ClassVar = ("initial",)
    from_rows: ClassVar = True
    offsets: ClassVar = True
    start: ClassVar = "heads:start"
    name: Literal["lofit"] = "lofit"
    targets: tuple[str] = ("o_proj",)
    """Name of the layer that reads the heads."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """How many of all heads get an offset; one at least."""

    def peft(self, *, total_steps: int | None) -> "peft.PeftConfig":
        import peft

        return peft.BeftConfig(task_type="CAUSAL_LM", target_modules=as_peft(self.targets))

    def check_quantization(self, quantization: str | None) -> None:
        if quantization is not None:
            raise UserError(
                "policy: lofit multiplies its offsets by whole weights, which quantised ones are not; use lora"
            )


WIDEST_HEAD = 256
"""Numbers that a head of any model gives."""
MIDDLES = (LoraSb, Sorsa, SvFit, NLora, LoraLdu, S2ft, Lofit)
