"""What every adapter is: the base of their classes, which a recipe's sections are.

PEFT is imported when an adapter is attached: a recipe is checked without it.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt

from align.errors import UserError
from align.registry import Registry
from align.section import Strict

if TYPE_CHECKING:
    import peft

Targets = Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)]
"""Names of layers that an adapter acts on."""
Reference = Literal["initial", "previous", "moving"]


class Adapter(Strict):
    """Base of an adapter's class, which is a recipe's `policy.adapter`."""

    mutates_base: ClassVar[bool] = False
    """It takes its start out of the base weights, as PEFT does for an `init_lora_weights` that begins with its name;
    it is saved as the difference to that start."""
    moved_start: ClassVar[bool] = False
    """It does not start as the identity, so that the reference is a frozen copy of its start."""
    from_rows: ClassVar[bool] = False
    """It starts from training rows."""
    needs_steps: ClassVar[bool] = False
    """It must know how many steps the run has."""
    needs_quantization: ClassVar[bool] = False
    """It makes sense on quantised weights alone."""
    averages: ClassVar[bool] = False
    """Whether the mean of two policies' weights is known exactly, so that a reference can follow the policy."""
    references: ClassVar[tuple[Reference, ...]] = ("initial", "previous", "moving")
    """What `online.reference` may be with it."""
    offsets: ClassVar[bool] = False
    """It adds to layers' outputs, for which a base without biases has no place."""
    start: ClassVar[str] = ""
    """Module of `align.model` and function of it (wrapped, adapter, *, folder, batches, loss, like) that sets the
    weights that it starts with, where PEFT does not: the base's folder, some training rows where it starts from them
    (None where a state, `like`, is loaded afterwards), and the loss of each of their lists."""
    if TYPE_CHECKING:  # of every class, in the order that suits it
        name: str

    def peft(self, *, total_steps: int | None) -> "peft.PeftConfig":
        """What PEFT calls it.

        Args:
            total_steps: of the run, where they are known.

        Raises:
            ValueError: it cannot be made for as many steps.
        """
        raise NotImplementedError

    def reads_rows(self) -> bool:
        """Whether, as it is set, it starts from training rows."""
        return self.from_rows

    def moves_start(self) -> bool:
        """Whether, as it is set, it does not start as the identity, so that the reference is a copy of its start."""
        return self.moved_start

    def is_offset(self) -> bool:
        """Whether, as it is set, it adds to layers' outputs, for which a base without biases has no place."""
        return self.offsets

    def served_rank(self) -> int | None:
        """The largest rank that it has when exported; None where it is no LoRA that vLLM can serve."""
        return None

    def check_quantization(self, quantization: str | None) -> None:
        """Refuse weights that it cannot train on.

        Raises:
            UserError: says which.
        """
        if quantization is None and self.needs_quantization:
            raise UserError(
                f"policy.adapter: {self.name} mends a quantised base; set `policy.quantization: 4bit` or use pissa"
            )
        if quantization is not None and self.mutates_base:
            raise UserError(
                f"policy: {self.name} changes the base weights, which quantised ones cannot take; use loftq"
            )

    def check_steps(self, steps: int) -> None:
        """Refuse a run of so few steps that it cannot train.

        Raises:
            UserError: says how many it needs.
        """


class InLayers(Adapter):
    """Base of those that act in layers which a recipe can choose."""

    targets: Targets | None = "all-linear"
    """Names of the layers it acts on; `all-linear`: every linear layer but the LM head."""
    exclude: tuple[str, ...] = ()
    """Names of layers, of those in `targets`, that it leaves alone."""
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """Numbers of the decoder's layers that it acts in, from 0 on; by default all."""


def as_peft(targets: Targets | None) -> str | list[str] | None:
    """Names of layers as PEFT takes them."""
    return list(targets) if isinstance(targets, tuple) else targets


ADAPTER: Registry[Adapter] = Registry("adapter")
