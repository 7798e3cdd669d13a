"""How our kernel draws the tokens of vLLM's requests, and how its figures travel through vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from align.kernels import Sample, sample, selective_logprobs

COLUMNS = 3
"""Log-probabilities that vLLM carries for each token: as drawn, under the policy itself, and the policy's entropy."""


@dataclass(frozen=True)
class Settings:
    """What `align.kernels.sample` needs of each row."""

    temperature: Float[Tensor, " B"]
    top_k: Int[Tensor, " B"]
    top_p: Float[Tensor, " B"]
    min_p: Float[Tensor, " B"]
    seed: Int[Tensor, " B"]

    @classmethod
    def of(cls, params: Sequence[Any], device: torch.device) -> "Settings":
        """Those of vLLM's SamplingParams; every request of ours has a seed."""

        def of(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(own, name) for own in params], dtype=dtype, device=device)

        top_k, seed = (of(name, torch.int64) for name in ("top_k", "seed"))
        return cls(of("temperature"), top_k.clamp_min(0), of("top_p"), of("min_p"), seed)  # top_k -1 is all in vLLM


def draw(
    logits: Float[Tensor, "B V"],
    settings: Settings,
    position: Int[Tensor, " B"],
    *,
    policy_logits: Float[Tensor, "B V"],
) -> Sample:
    """Draw a token for each row; what is said of it beside `processed_logprob` is of the policy itself.

    Args:
        logits: to be drawn from, before temperature and filters.
        position: of the token in its completion, from 0: with the seed it decides the draw.
        policy_logits: the model's own; other than `logits` where the decoding changed them.

    Returns:
        At temperature 0 `processed_logprob` is that of the policy, as with the other engines.
    """
    drawn = sample(logits, **vars(settings), position=position, rank=False)
    if policy_logits is not logits:
        likeliest = sample(policy_logits, temperature=0.0, seed=0, position=0, rank=False)
        raw = selective_logprobs(policy_logits, drawn.token)
        drawn = replace(drawn, raw_logprob=raw, entropy=likeliest.entropy)
    processed = torch.where(settings.temperature > 0, drawn.processed_logprob, drawn.raw_logprob)
    return replace(drawn, processed_logprob=processed)


def columns(drawn: Sample) -> tuple[Int[Tensor, "B 3"], Float[Tensor, "B 3"], Int[Tensor, " B"]]:
    """The three fields of vLLM's LogprobsTensors: tokens, their figures, 0 for ranks (nobody reads them). vLLM takes
    the figures for the likeliest tokens' log-probabilities; `CompletionOutput.logprobs` has them in this order."""
    tokens = drawn.token.to(torch.int32)[:, None].expand(-1, COLUMNS)
    figures = torch.stack([drawn.processed_logprob, drawn.raw_logprob, drawn.entropy], 1)
    return tokens, figures, torch.zeros_like(drawn.token)
