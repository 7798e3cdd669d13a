"""What a decoding is given, and what it does with it, whichever of vLLM's model runners asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

CONFIG = "align_decoding"
"""Where vLLM's `additional_config` has the recipe's section and, for its baseline, arguments of a VllmEngine."""


@dataclass(frozen=True)
class Request:
    """A completion that is being written."""

    params: Any
    """vLLM's SamplingParams; `extra_args` are what the engine says of it to the decoding."""
    prompt: Sequence[int] | None
    output: Sequence[int]
    """Its tokens so far."""

    @property
    def extra(self) -> dict[str, Any]:
        """Empty where the decoding leaves it alone."""
        return self.params.extra_args or {}


class Decoding(Protocol):
    """Changes logits before temperature and filters."""

    def alter(self, logits: Float[Tensor, "B V"], requests: Sequence[Request]) -> Float[Tensor, "B V"]:
        """New logits; those given stay as they are, and are given back where no request asks for a change."""
        ...
