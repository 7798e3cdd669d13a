"""The engine that runs wherever the trainer does: transformers' `generate` on a model of its own."""

import gc
from collections.abc import Container, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.evaluate.sampling import Sampled, sample_tokens
from align.model.load import load_model
from align.rollout.engine import Contexts, Prompts, Sampling, Weights
from align.runs.memory import lack_in_words


class TransformersEngine:
    """Samples with `sample_tokens`; see there for how a completion follows from prompt and seed."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, *, dtype: str, tokens_per_batch: int, trusted: bool
    ) -> None:
        """Args:
        folder: the base model's.
        tokenizer: the policy's.
        dtype: what the weights are held in.
        tokens_per_batch: rows times tokens of one `generate` at most.
        trusted: whether model code from the hub may run.
        """
        self.folder, self.tokenizer, self.dtype, self.trusted = folder, tokenizer, dtype, trusted
        self.tokens_per_batch = tokens_per_batch
        self.weights: Weights | None = None
        self.model: PreTrainedModel | PeftModel | None = None

    def sample(
        self, prompts: Prompts, sampling: Sampling, contexts: Contexts | None = None, done: Container[int] = ()
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """As every engine, without a decoding of its own.

        A batch is made of all prompts, `done` or not: what they are computed with moves their last digits.
        """
        goes_on = "what is sampled already is kept"
        with lack_in_words("rollout.engine.tokens_per_batch={}", self.tokens_per_batch, goes_on=goes_on):
            yield from self._sample(prompts, sampling, done)

    def _sample(
        self, prompts: Prompts, sampling: Sampling, done: Container[int]
    ) -> Iterator[tuple[int, list[Sampled]]]:
        self.model = self.model or self._loaded()
        options = asdict(sampling)
        per_prompt = options.pop("completions")
        waiting: dict[int, dict[int, Sampled]] = {}
        for prompt, place, sampled in sample_tokens(
            self.model,
            self.tokenizer,
            list(prompts),
            per_prompt=per_prompt,
            done=done,
            tokens_per_batch=self.tokens_per_batch,
            **options,
        ):
            own = waiting.setdefault(prompt, {})
            own[place] = sampled
            if len(own) == per_prompt:
                yield prompt, [own[k] for k in range(per_prompt)]
                del waiting[prompt]

    def load(self, weights: Weights) -> None:
        """As every engine."""
        self.close()
        self.weights = weights

    def rest(self, *, stop: bool) -> None:
        """The model is dropped, and read again when it is needed."""
        self.close()

    def close(self) -> None:
        """As every engine."""
        if self.model is not None:
            self.model = None
            gc.collect()

    def _loaded(self) -> PreTrainedModel | PeftModel:
        merged = self.weights is not None and self.weights.kind == "merged"
        model, _ = load_model(
            Path(self.weights.folder) if self.weights and merged else self.folder,
            dtype=self.dtype,
            attention=None,
            quantization=None,
            trust_remote_code=self.trusted,
            dropout=True,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        if self.weights and not merged:
            return PeftModel.from_pretrained(model, self.weights.folder)
        return model
