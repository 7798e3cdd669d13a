"""What the recipe's `rollout.decoding` does to the logits, whichever of vLLM's model runners asks for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from align.kernels import contrast_logits
from align.rollout.config import Contrast, DecodingConfig

CONFIG = "align_decoding"
"""Where vLLM's `additional_config` has the recipe's section."""


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


def open_decoding(additional_config: Mapping[str, Any]) -> Decoding | None:
    """What vLLM's configuration asks for."""
    if CONFIG not in additional_config:
        return None
    config: DecodingConfig = TypeAdapter(DecodingConfig).validate_python(additional_config[CONFIG])
    return Contrasted(config)


class Contrasted:
    """(1 + strength) z - strength z', with z' the logits that the same completion has in another context or model.

    Two requests write one completion: `extra` of both names the `pair`, and the one in the other context is `against`.
    They stay in step, and draw the same token, since both get the same logits and have the same seed.
    """

    def __init__(self, config: Contrast) -> None:
        self.config = config

    def alter(self, logits: Float[Tensor, "B V"], requests: Sequence[Request]) -> Float[Tensor, "B V"]:
        """As every decoding.

        Raises:
            RuntimeError: one request of a pair is further than the other.
        """
        sides: dict[bool, dict[str, int]] = {False: {}, True: {}}
        for row, request in enumerate(requests):
            if "pair" in request.extra:
                sides[request.extra["against"]][request.extra["pair"]] = row
        own, other = sides[False], sides[True]
        if not own and not other:
            return logits
        rows = [(own.get(pair), other.get(pair)) for pair in own | other]
        if any(a is None or b is None or len(requests[a].output) != len(requests[b].output) for a, b in rows):
            raise RuntimeError("a completion and the one it is held against are out of step")
        first, second = torch.tensor(rows, device=logits.device).T
        pair = torch.full((len(logits),), -1, device=logits.device)
        pair[first] = second
        altered = contrast_logits(logits, pair, self.config.strength, mask_tau=self.config.plausible)
        altered[second] = altered[first]
        return altered
