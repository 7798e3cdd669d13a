"""What of ours runs inside vLLM's first model runner (every CPU, and GPUs with VLLM_USE_V2_MODEL_RUNNER=0).

vLLM's workers import this module by its name; it fits vLLM 0.25, 0.31 and 0.32.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from align.kernels import Sample
from align.rollout.inside_vllm import Request, open_decoding
from align.rollout.inside_vllm.draw import Settings, columns, draw


class Requests(LogitsProcessor):
    """Knows which request each row of the logits belongs to, and changes the logits as the recipe's decoding says."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.rows: dict[int, Request] = {}
        self.settings: Settings | None = None
        self.decoding = open_decoding(vllm_config.additional_config)

    def is_argmax_invariant(self) -> bool:
        """Said even where we change nothing, so that `apply` comes before temperature and filters."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests as they come, move and go."""
        if process_dict_updates(self.rows, batch_update, Request):
            self.settings = None

    def apply(self, logits: Tensor) -> Tensor:
        """Logits [B, V] as they are to be sampled."""
        return self.decoding.alter(logits, self.in_order(logits)) if self.decoding else logits

    def in_order(self, logits: Tensor) -> list[Request]:
        """The request of every row."""
        return [self.rows[row] for row in range(len(logits))]

    def settings_of(self, requests: list[Request]) -> Settings:
        """How the rows are drawn; read again only when a request has come, moved or gone."""
        if self.settings is None:
            self.settings = Settings.of([request.params for request in requests], self.device)
        return self.settings


class OneReadSampler(Sampler):
    """vLLM's sampler with our kernel in the place of its temperature, filters, draw and log-probabilities."""

    def forward(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; the policy's own logits are kept for their log-probabilities."""
        self.policy_logits = logits
        output = super().forward(logits, *args, **kwargs)
        del self.policy_logits  # [B, V], which the next forward pass needs the memory of
        return output

    def sample(self, logits: Tensor, sampling_metadata: SamplingMetadata, *args: Any, **kwargs: Any) -> Any:
        """A token per row, and in the place of a row's log-probabilities what the kernel says of the token."""
        own = next(one for one in sampling_metadata.logitsprocs.non_argmax_invariant if isinstance(one, Requests))
        requests = own.in_order(logits)
        positions = torch.tensor([len(request.output) for request in requests], device=logits.device)
        policy_logits = self.policy_logits if own.decoding else logits  # the same, but vLLM has made it float32
        drawn = draw(logits, own.settings_of(requests), positions, policy_logits=policy_logits)
        return drawn.token, drawn

    @staticmethod
    def gather_logprobs(logprobs: Tensor | Sample, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        """As vLLM's; of a sampled token the columns of `draw.columns`."""
        if isinstance(logprobs, Tensor):  # a prompt's
            return Sampler.gather_logprobs(logprobs, num_logprobs, token_ids)
        return LogprobsTensors(*columns(logprobs))
