"""What of ours runs inside vLLM's second model runner (on a GPU, with VLLM_USE_V2_MODEL_RUNNER=1).

vLLM's workers import this module by its name; it fits vLLM 0.31 and 0.32. Rows of the logits come in another order in
every step here, and requests keep a slot.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from align.rollout.inside_vllm import Request, open_decoding
from align.rollout.inside_vllm.draw import Settings, columns, draw


class Requests(LogitsProcessor):
    """Changes the logits as the recipe's decoding says."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self.states = req_states
        self.params: dict[int, SamplingParams] = {}
        self.decoding = open_decoding(vllm_config.additional_config)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Whether the decoding may change the logits of the request in this slot."""
        self.params[req_idx] = sampling_params
        return self.decoding is not None and bool(sampling_params.extra_args)

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Logits [B, V] as they are to be sampled."""
        if self.decoding is None:
            return logits
        lengths = ctx.seq_lens_upper_bound_np.tolist()
        requests = [self._request(slot, end) for slot, end in zip(ctx.idx_mapping_np.tolist(), lengths, strict=True)]
        return self.decoding.alter(logits, requests)

    def _request(self, slot: int, length: int) -> Request:
        first = int(self.states.prompt_len.np[slot])
        tokens = self.states.all_token_ids.gpu[slot, :length].tolist()
        return Request(self.params[slot], tokens[:first], tokens[first:])


class OneReadSampler(Sampler):
    """vLLM's sampler with our kernel in the place of its temperature, filters, draw and log-probabilities.

    Its class is given to a sampler that vLLM has made, so what it keeps beside is made when it is first needed.
    """

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """As vLLM's, which is told of no temperature and no filter, so that it leaves the logits alone."""
        self.__dict__.setdefault("params", {})[req_idx] = sampling_params
        self.slots: tuple[int, ...] = ()
        plain = sampling_params.clone()
        plain.temperature, plain.top_k, plain.top_p, plain.min_p = 1.0, 0, 1.0, 0.0
        super().add_request(req_idx, plain)

    def __call__(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, with the columns of `draw.columns` as a token's log-probabilities."""
        output = super().__call__(logits, *args, **kwargs)
        output.logprobs_tensors = LogprobsTensors(*columns(self.drawn))
        return output

    def get_logprobs_dims(self, *args: Any, **kwargs: Any) -> None:
        """Says that none are wanted: vLLM's own would take another pass over the logits."""
        return None

    def sample(
        self, logits: Tensor, expanded_idx_mapping: Tensor, *args: Any, return_logprobs: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """A token per row, and the logits as the decoding has them."""
        altered = self.apply_sampling_params(logits, expanded_idx_mapping, *args, **kwargs, skip_top_k_top_p=True)
        _, idx_mapping_np, positions, *_ = args
        first = self.req_states.prompt_len.gpu[expanded_idx_mapping]
        settings = self._settings_of(tuple(idx_mapping_np.tolist()), logits.device)
        self.drawn = draw(altered, settings, positions + 1 - first, policy_logits=logits)
        return self.drawn.token, altered

    def _settings_of(self, slots: tuple[int, ...], device: torch.device) -> Settings:
        """How the rows are drawn; made again only when requests come or change their order."""
        if slots != self.slots:
            self.slots, self.settings = slots, Settings.of([self.params[slot] for slot in slots], device)
        return self.settings
