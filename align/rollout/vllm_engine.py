"""vLLM's engine in this process; vLLM is imported inside functions only.

It changes the process (threads, random state, environment), so it runs in one of its own: see `process.py`.
"""

import logging
import os
from collections.abc import Container, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from align.evaluate.sampling import Sampled, row_seed
from align.export.vllm_start import environment
from align.rollout.engine import Contexts, Prompts, Sampling, Weights
from align.rollout.inside_vllm.draw import COLUMNS
from align.rollout.pairs import Pair, Room, batches
from align.rollout.vllm_arguments import VllmArguments, llm_arguments, takes_our_sampler
from align.rollout.weights import check_same_layout, is_tied

log = logging.getLogger("align")

IN_FLIGHT = 1024
"""Completions handed to the engine at a time: more than it runs at once, and no more than memory is glad of."""


class VllmEngine:
    """One vLLM engine and the policy that it has loaded."""

    def __init__(self, arguments: VllmArguments) -> None:
        self.arguments = arguments
        os.environ.update(environment(os.environ))
        if not torch.cuda.is_available():
            torch._dynamo.config.disable = True  # the variable comes too late where torch is loaded already
        self.ours = takes_our_sampler(arguments.sampler)
        self.llm = self._start(arguments.folder)
        self.lora: Any = None
        self.other: Any = None
        self.loaded: list[Weights] = []
        self.numbers = count(1)  # of adapters; one whose load failed is never used again
        self.asleep = False

    def sample(
        self, prompts: Prompts, sampling: Sampling, contexts: Contexts | None = None, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """As every engine; all prompts go to the same weights, since a CPU engine mixes up base and adapter."""
        self._wake()
        if contexts is not None and (self.arguments.decoding or {}).get("name") == "contrast":
            return self._in_pairs(prompts, contexts, sampling, done)
        return self._alone(prompts, sampling, contexts, done)

    def _alone(
        self, prompts: Prompts, sampling: Sampling, contexts: Contexts | None, done: Container[int]
    ) -> Iterator[tuple[int, list[Sampled]]]:
        waiting = [place for place in range(len(prompts)) if place not in done][::-1]
        running: set[str] = set()
        most = max(1, IN_FLIGHT // sampling.completions)
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    place = waiting.pop()
                    extra = None if contexts is None else {"prompt": contexts[place]}
                    # vLLM gives the k-th completion the seed plus k.
                    params = self._params(sampling, row_seed(sampling.seed, prompts[place], 0), extra)
                    self._add(str(place), prompts[place], params, self.lora)
                    running.add(str(place))
                for output in self._step(running):
                    yield int(output.request_id), [self._sampled(one) for one in output.outputs]
        finally:
            self.llm.llm_engine.abort_request(list(running))

    def _in_pairs(
        self, prompts: Prompts, against: Contexts, sampling: Sampling, done: Container[int]
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """Every completion by two requests; those of a batch start in one step and so stay in step."""
        per_prompt = sampling.completions
        wanted = [place for place in range(len(prompts)) if place not in done]
        pairs = [Pair(i, k, prompts[i], against[i]) for i in wanted for k in range(per_prompt)]
        drawn: dict[int, dict[int, Sampled]] = {}
        running: set[str] = set()
        try:
            room = Room.of(self.llm.llm_engine.vllm_config)
            for batch in list(batches(pairs, sampling.max_tokens, room)):  # a pair without room is named at once
                for pair in batch:
                    running |= self._start_pair(pair, sampling)
                while running:
                    for output in self._step(running):
                        prompt, sample, side = output.request_id.split()
                        if side == "own":
                            self._drop(f"{prompt} {sample} against", running)
                            drawn.setdefault(int(prompt), {})[int(sample)] = self._sampled(output.outputs[0])
                            if len(drawn[int(prompt)]) == per_prompt:
                                own = drawn.pop(int(prompt))
                                yield int(prompt), [own[k] for k in range(per_prompt)]
        finally:
            self.llm.llm_engine.abort_request(list(running))

    def _start_pair(self, pair: Pair, sampling: Sampling) -> set[str]:
        """The names of its requests."""
        name, seed = f"{pair.prompt} {pair.sample}", row_seed(sampling.seed, pair.own, 0) + pair.sample
        own, against = (replace(sampling, completions=1, stop=stop) for stop in (sampling.stop, ()))
        own_params = self._params(own, seed, {"pair": name, "against": False})
        against_params = self._params(against, seed, {"pair": name, "against": True})  # it is ended with the other
        self._add(f"{name} own", pair.own, own_params, self.lora)
        self._add(f"{name} against", pair.against, against_params, self.other)
        return {f"{name} own", f"{name} against"}

    def _step(self, running: set[str]) -> list[Any]:
        """What has finished; no longer `running`."""
        finished = [output for output in self.llm.llm_engine.step() if output.finished]
        running.difference_update(output.request_id for output in finished)
        return finished

    def _drop(self, name: str, running: set[str]) -> None:
        if name in running:
            self.llm.llm_engine.abort_request([name])
            running.discard(name)

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

        llm = LLM(folder, **llm_arguments(self.arguments, ours=self.ours))
        if self.ours:
            llm.collective_rpc("use_one_read_sampler")
        return llm

    def _params(self, sampling: Sampling, seed: int, extra: dict[str, Any] | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=sampling.completions,
            seed=seed,
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_ids),
            max_tokens=sampling.max_tokens,
            logprobs=COLUMNS - 1 if self.ours else 0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra,
        )

    def _add(self, name: str, prompt: list[int], params: Any, lora: Any) -> None:
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=lora)

    def _sampled(self, output: Any) -> Sampled:
        ids, ended, figures = list(output.token_ids), output.finish_reason == "stop", output.logprobs.logprobs
        if not self.ours:
            return Sampled(ids, figures, ended)
        drawn, raw, entropies = (figures[column::COLUMNS] for column in range(COLUMNS))
        return Sampled(ids, drawn, ended, raw, entropies)

    def _load_adapter(self, weights: Weights) -> None:
        from vllm.lora.request import LoRARequest

        old = {self.lora, self.other} - {None}
        own = other = LoRARequest(weights.name, next(self.numbers), weights.folder)
        if weights.against:
            other = LoRARequest(f"{weights.name}-against", next(self.numbers), weights.against)
        for lora in (own, other):
            self.llm.llm_engine.add_lora(lora)  # a bad one raises here; inside `step` it would leave the engine stuck
        self.lora, self.other = own, other
        for lora in old:
            self.llm.llm_engine.remove_lora(lora.lora_int_id)

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
