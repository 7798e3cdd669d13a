"""vLLM's engine in this process; the one module that imports vLLM, and only inside a function.

It changes the process (threads, random state, environment), so it runs in one of its own: see `process.py`.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from align.errors import UserError
from align.evaluate.sampling import Sampled, row_seed
from align.rollout.engine import Prompts, Sampling, Weights
from align.rollout.weights import check_same_layout, is_tied

log = logging.getLogger("align")

IN_FLIGHT = 1024
"""Completions handed to the engine at a time: more than it runs at once, and no more than memory is glad of."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for."""


@dataclass(frozen=True)
class VllmArguments:
    """What a VllmEngine is made from; plain values, since they travel to its process."""

    folder: str
    """The base model's."""
    dtype: str
    """What the weights are held in, and the model is run in."""
    max_length: int
    """Tokens of prompt plus completion at most."""
    lora_rank: int = 0
    """Of the adapters to come; 0 where there will be none."""
    cache_bytes: int = 512 << 20
    """Key-value cache, on a CPU."""
    trusted: bool = False
    """Whether model code from the hub may run."""
    options: dict[str, Any] = field(default_factory=dict)
    """More arguments of vllm.LLM."""


class VllmEngine:
    """One vLLM engine and the policy that it has loaded."""

    def __init__(self, arguments: VllmArguments) -> None:
        self.arguments = arguments
        os.environ.update(environment(os.environ))
        if not torch.cuda.is_available():
            torch._dynamo.config.disable = True  # the variable comes too late where torch is loaded already
        self.llm = self._start(arguments.folder)
        self.lora: Any = None
        self.loaded: list[Weights] = []
        self.asleep = False

    def sample(self, prompts: Prompts, sampling: Sampling) -> Iterator[tuple[int, list[Sampled]]]:
        """As every engine; all prompts go to the same weights, since a CPU engine mixes up base and adapter."""
        self._wake()
        engine = self.llm.llm_engine
        waiting = list(range(len(prompts)))[::-1]
        running: set[int] = set()
        most = max(1, IN_FLIGHT // sampling.completions)
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    self._add(waiting[-1], prompts[waiting[-1]], sampling)
                    running.add(waiting.pop())
                for output in engine.step():
                    if output.finished:
                        index = int(output.request_id)
                        running.discard(index)
                        yield index, [_sampled(one) for one in output.outputs]
        finally:
            engine.abort_request([str(index) for index in running])

    def load(self, weights: Weights) -> None:
        """As every engine.

        Raises:
            ValueError: the name or folder was loaded before, or the weights do not fit the engine's model.
        """
        if any(weights.name == old.name or weights.folder == old.folder for old in self.loaded):
            raise ValueError(f"{weights.name} was loaded before; the engine would go on with what it has cached")
        self._wake()
        if weights.kind == "adapter":
            self._load_adapter(weights)
        else:
            self._load_merged(weights)
        self.loaded.append(weights)
        if not self.llm.llm_engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, so old keys and values could be used again")

    def rest(self, *, stop: bool) -> None:
        """Weights go to the host's memory and the cache is dropped, on a GPU; the process holding us does `stop`."""
        if not self.asleep and torch.cuda.is_available():
            self.llm.sleep(level=1)
            self.asleep = True

    def close(self) -> None:
        """As every engine."""
        self.llm.llm_engine.engine_core.shutdown()

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def _start(self, folder: str) -> Any:
        from vllm import LLM

        return LLM(folder, **llm_arguments(self.arguments))

    def _add(self, index: int, prompt: list[int], sampling: Sampling) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=sampling.completions,
            seed=row_seed(sampling.seed, prompt, 0),  # vLLM gives the k-th completion the seed plus k
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_ids),
            max_tokens=sampling.max_tokens,
            logprobs=0,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = {"prompt_token_ids": prompt}
        self.llm.llm_engine.add_request(str(index), request, params, lora_request=self.lora)

    def _load_adapter(self, weights: Weights) -> None:
        from vllm.lora.request import LoRARequest

        old, new = self.lora, LoRARequest(weights.name, len(self.loaded) + 1, weights.folder)
        self.llm.llm_engine.add_lora(new)  # a bad adapter raises here; inside `step` it would leave the engine stuck
        self.lora = new
        if old is not None:
            self.llm.llm_engine.remove_lora(old.lora_int_id)

    def _load_merged(self, weights: Weights) -> None:
        check_same_layout(Path(weights.folder), Path(self.arguments.folder))
        if is_tied(Path(weights.folder)) == is_tied(Path(self.arguments.folder)):
            try:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": weights.folder})
                return
            except Exception as error:  # whatever it was, the engine's weights are half gone now
                log.warning("vLLM could not reload weights (%s); starting it again with %s", error, weights.folder)
        self.close()
        self.llm = self._start(weights.folder)


def environment(present: Mapping[str, str]) -> dict[str, str]:
    """Variables that vLLM's process needs, where the user has not set them.

    Raises:
        UserError: one is set in a way that cannot work.
    """
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with its parent
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if not torch.cuda.is_available():
        # Two threads on busy cores spin; compilation takes seconds and a C++ compiler, and gains nothing when eager.
        wanted |= {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
        if present.get("VLLM_BATCH_INVARIANT", "0") != "0":
            raise UserError("VLLM_BATCH_INVARIANT stops vLLM on a CPU, whose results do not depend on the batch; unset")
    return {name: value for name, value in wanted.items() if name not in present}


def llm_arguments(arguments: VllmArguments) -> dict[str, Any]:
    """Arguments of vllm.LLM.

    Raises:
        UserError: an option that would make results wrong.
    """
    if arguments.options.get("model_impl") == "transformers":
        raise UserError("rollout.engine.options: model_impl patches transformers' classes; use `engine: transformers`")
    given: dict[str, Any] = {
        "dtype": arguments.dtype,  # `auto` would cast float32 checkpoints to bfloat16
        "max_model_len": arguments.max_length,
        "seed": 0,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": 1,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "trust_remote_code": arguments.trusted,
        "disable_log_stats": True,
    }
    if arguments.lora_rank:
        room = next((rank for rank in LORA_RANKS if rank >= arguments.lora_rank), LORA_RANKS[-1])
        given |= {"enable_lora": True, "max_lora_rank": room, "max_loras": 1, "max_cpu_loras": 2}
    if torch.cuda.is_available():
        given |= {"enable_sleep_mode": True, "gpu_memory_utilization": 0.5}  # the trainer has its model there too
    else:
        given |= {
            "kv_cache_memory_bytes": arguments.cache_bytes,
            "enforce_eager": True,
            "block_size": 32,  # the default of 128 leaves shorter prompts out of the prefix cache
            # A seeded request whose prompt is split over steps crashes on a CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, arguments.max_length),
        }
    return given | arguments.options


def _sampled(output: Any) -> Sampled:
    ids = list(output.token_ids)
    logprobs = [places[token].logprob for places, token in zip(output.logprobs, ids, strict=True)]
    return Sampled(ids, logprobs, ended=output.finish_reason == "stop")
