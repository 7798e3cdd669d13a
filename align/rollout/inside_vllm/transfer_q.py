"""Transfer Q*: tokens weighed by the reward of what a baseline makes of them."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.evaluate.sampling import completion_text
from align.model.load import load_tokenizer
from align.rollout.config import TransferQ
from align.rollout.engine import Sampling
from align.rollout.inside_vllm.request import Request
from rewards import Scorer, load_scorer

Tokens = tuple[int, ...]
Continue = Callable[[list[Tokens], Sequence[int]], dict[Tokens, list[int]]]
"""(texts as token ids, no two alike; tokens that end a text) -> what the baseline writes after each."""


class Guided:
    """z + strength r over the likeliest tokens of each row, -inf elsewhere.

    `extra` of a request has its prompt as scorers read it: a text, or messages.

    Source: Chakraborty et al. (2405.20495), with the settings of the authors' code
    """

    def __init__(
        self,
        config: TransferQ,
        tokenizer: PreTrainedTokenizerBase,
        continue_: Continue,
        reward: Scorer,
        baseline_reward: Scorer | None = None,
    ) -> None:
        """Args:
        tokenizer: the policy's, and the baseline's.
        continue_: the baseline.
        baseline_reward: what the baseline was trained for, if not `reward`.
        """
        self.config, self.tokenizer, self.continue_ = config, tokenizer, continue_
        self.reward, self.baseline_reward = reward, baseline_reward

    def alter(self, logits: Float[Tensor, "B V"], requests: Sequence[Request]) -> Float[Tensor, "B V"]:
        """As every decoding."""
        rows = [row for row, request in enumerate(requests) if "prompt" in request.extra]
        if not rows:
            return logits
        likeliest = logits[rows].float().topk(min(self.config.candidates, logits.shape[1]))
        pairs = zip(rows, likeliest.indices.tolist(), strict=True)
        rewards = self._rewards([(requests[row], token) for row, tokens in pairs for token in tokens])
        guided = likeliest.values + self.config.strength * torch.tensor(rewards).view_as(likeliest.values).to(
            logits.device
        )
        altered = logits.float().clone()
        altered[rows] = torch.full_like(altered[rows], -torch.inf).scatter(1, likeliest.indices, guided)
        return altered

    def _rewards(self, candidates: list[tuple[Request, int]]) -> list[float]:
        """Of each request with one more token, and with what the baseline writes then."""
        ends = candidates[0][0].params.stop_token_ids
        begun = [(*(request.prompt or ()), *request.output, token) for request, token in candidates]
        continuations = self.continue_([ids for ids in dict.fromkeys(begun) if ids[-1] not in ends], ends)
        prompts: list[Any] = []
        texts: list[Any] = []
        for (request, _), ids in zip(candidates, begun, strict=True):
            prompt, length = request.extra["prompt"], len(request.prompt or ())
            whole = [*ids, *continuations.get(ids, [])]
            text = completion_text(self.tokenizer, whole[:length], whole[length:], ends, request.params.stop)
            prompts.append(prompt)
            texts.append(text if isinstance(prompt, str) else [{"role": "assistant", "content": text}])
        rewards = self.reward.score(prompts, texts)
        if self.baseline_reward is None:
            return rewards
        others = self.baseline_reward.score(prompts, texts)
        return [math.exp((own - other) / 2) * own for own, other in zip(rewards, others, strict=True)]


def open_guided(config: TransferQ, engine: dict[str, Any]) -> Guided:
    """With an engine of its own in this process for the baseline, which starts when it is first needed.

    Args:
        engine: arguments of the baseline's VllmEngine.
    """
    return Guided(
        config,
        load_tokenizer(engine["folder"], trust_remote_code=engine["trusted"]),
        VllmBaseline(engine, config.continuation),
        load_scorer(config.reward),
        load_scorer(config.baseline_reward) if config.baseline_reward else None,
    )


class VllmBaseline:
    """A model in vLLM that goes on with texts greedily."""

    def __init__(self, engine: dict[str, Any], tokens: int) -> None:
        """Args:
        tokens: of a continuation at most.
        """
        self.arguments, self.tokens = engine, tokens

    def __call__(self, texts: list[Tokens], ends: Sequence[int]) -> dict[Tokens, list[int]]:
        """As `Continue`; a text that fills the model's length stays as it is."""
        found: dict[Tokens, list[int]] = {}
        by_room: dict[int, list[Tokens]] = {}
        for ids in texts:
            by_room.setdefault(min(self.tokens, self.arguments["max_length"] - len(ids)), []).append(ids)
        for room, own in by_room.items():
            if room < 1:
                continue
            sampling = Sampling(completions=1, max_tokens=room, seed=0, temperature=0.0, stop_ids=tuple(ends))
            for place, completions in running_engine(self.arguments).sample([list(ids) for ids in own], sampling):
                found[own[place]] = completions[0].ids
        return found


_running: dict[str, Any] = {}


def running_engine(arguments: dict[str, Any]) -> Any:
    """A VllmEngine that lives as long as the process: one that is freed takes the others' distributed state along."""
    from align.rollout.vllm_arguments import VllmArguments
    from align.rollout.vllm_engine import VllmEngine

    key = json.dumps(arguments, sort_keys=True)
    if key not in _running:
        _running[key] = VllmEngine(VllmArguments(**arguments))
    return _running[key]
