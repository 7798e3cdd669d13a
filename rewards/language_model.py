"""Log-probabilities of completions under a causal language model, with or without an adapter."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from align.kernels import linear_logprobs
from rewards.backbone import Backbone
from rewards.broken import why_not_finite
from rewards.loading import context, folder_of, load_model, load_tokenizer, with_adapters
from rewards.logits import decoder_of, scale_and_cap
from rewards.texts import common_prefix, cut, joint_ids, prompt_texts, text_key, token_ids
from rewards.types import RowError, RunningOptions, ScorerError, Tally, Text

TOLERANCE = {torch.float32: 1e-3}
"""Nats by which our log-probabilities may differ from the model's own; coarser for other dtypes."""


class LanguageModel:
    """A model with its tokenizer, and adapters of which one may be on at a time."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        adapters: Mapping[str, str] | None = None,
        tally: Tally,
        **running: Unpack[RunningOptions],
    ) -> None:
        """Args:
        model: a local folder, or a hub name.
        adapters: name -> folder or hub name of a PEFT adapter.
        tally: counts what is done.

        Raises:
            ScorerError: model or adapter cannot be loaded, or its head is not a plain linear layer.
        """
        folder = folder_of(model, revision)
        self.model, report = load_model(AutoModelForCausalLM, folder, dtype=running["dtype"], device=running["device"])
        if report["missing_keys"]:
            raise ScorerError(f"{model}: incomplete, its weights lack {sorted(report['missing_keys'])[0]}")
        self.tokenizer = load_tokenizer(folder)
        self.backbone = Backbone(
            decoder_of(self.model),
            name=model,
            tokens_per_batch=running["tokens_per_batch"],
            exact=running["exact"],
        )
        self.head = _head(self.model)
        _check_head(self.model, self.head, model)
        self.adapted = with_adapters(self.model, adapters) if adapters else None
        if not isinstance(self.model.get_output_embeddings(), nn.Linear):
            raise ScorerError(f"{model}: an adapter changes its LM head; merge it into the model first")
        self.ends = _ends(self.model, self.tokenizer)
        self.tokens_per_batch = running["tokens_per_batch"]
        self.max_length = context(self.model, self.tokenizer, running["max_length"])
        self.tally = tally

    def logprobs(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        append_eos: bool = True,
        adapter: str | None = None,
        templated: bool = False,
    ) -> list[tuple[float, int]]:
        """Summed log-probability of each completion given its prompt, and its number of tokens.

        Args:
            append_eos, adapter, templated: as for `token_logprobs`.

        Returns:
            (nats, tokens) in order.

        Raises:
            RowError: as `token_logprobs`.
        """
        found = self.token_logprobs(prompts, completions, append_eos=append_eos, adapter=adapter, templated=templated)
        return [(own.sum().item(), len(own)) for own in found]

    @torch.no_grad()
    def token_logprobs(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        append_eos: bool = True,
        adapter: str | None = None,
        templated: bool = False,
    ) -> list[Float[Tensor, " T"]]:
        """Log-probability of each token of each completion given its prompt, float64, in nats.

        A completion's tokens are those of the joint text behind what it has in common with the prompt's own tokens.

        Args:
            append_eos: a plain text ends with the tokenizer's end token; a chat template ends messages in its own way.
            adapter: which adapter is on; None for the plain model.
            templated: prompts are texts that a chat template has made, with all special tokens in them.

        Raises:
            RowError: messages without a chat template, an empty text, or a completion that others wrote a part of.
        """
        if any(message["role"] != "assistant" for own in completions if not isinstance(own, str) for message in own):
            raise RowError(
                "a completion in which a tool or a user speaks too has no log-probability of the assistant's alone; "
                "score it with a reward model or a judge"
            )
        joint = joint_ids(prompts, completions, self.tokenizer, templated=templated)
        before = prompt_texts(prompts, completions, self.tokenizer, templated=templated)
        eos = self.tokenizer.eos_token_id
        if append_eos and eos is not None:
            plain = [not templated for _, templated in before]
            joint = [[*ids, eos] if bare and ids[-1] != eos else ids for ids, bare in zip(joint, plain, strict=True)]
        starts = [max(common_prefix([*both]), 1) for both in zip(joint, token_ids(before, self.tokenizer), strict=True)]
        rows = [cut(ids, self.max_length) for ids in joint]
        sizes = [min(len(ids) - start, len(row) - 1) for ids, start, row in zip(joint, starts, rows, strict=True)]
        self.tally.read(joint, rows)
        with self._using(adapter):
            return self._last(rows, sizes, [text_key(prompt) for prompt in prompts])

    @torch.no_grad()
    def write(
        self, texts: Sequence[str], *, tokens: int, templated: bool = False, stop: str | None = None
    ) -> list[str]:
        """The likeliest continuation of each text, token by token.

        Args:
            tokens: of a continuation, at most.
            templated: as for `logprobs`.
            stop: a text behind which nothing more is written.
        """
        room = max(2, self.max_length - tokens)
        rows = [cut(ids, room) for ids in token_ids([(text, templated) for text in texts], self.tokenizer)]
        self.tally.read(rows, rows)
        written = [""] * len(texts)
        left = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        while left:
            size = max(1, self.tokens_per_batch // (len(rows[left[0]]) + tokens))
            batch, left = left[:size], left[size:]
            for i, text in zip(batch, self._written([rows[i] for i in batch], tokens, stop), strict=True):
                written[i] = text
        return written

    def _written(self, rows: list[list[int]], tokens: int, stop: str | None) -> list[str]:
        pad, width = (self.ends or [0])[0], max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        ends = {"eos_token_id": self.ends, "pad_token_id": pad}
        config = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=tokens, **ends)
        given: dict[str, Any] = (
            {"stopping_criteria": StoppingCriteriaList([_Said(self.tokenizer, stop, width)])} if stop else {}
        )
        found = self.model.generate(  # type: ignore[operator]  # transformers keeps it outside PreTrainedModel
            input_ids=ids, attention_mask=mask, generation_config=config, **given
        )
        return self.tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)

    def _last(self, rows: list[list[int]], sizes: list[int], groups: list[str]) -> list[Float[Tensor, " T"]]:
        """Of each row, the log-probabilities of its last `size` tokens."""
        places = [range(len(row) - 1 - size, len(row) - 1) for row, size in zip(rows, sizes, strict=True)]
        logprobs = [torch.zeros(0)] * len(rows)
        for members, hidden in self.backbone.states(rows, groups, places):
            targets = torch.tensor([t for i in members for t in rows[i][len(rows[i]) - sizes[i] :]], dtype=torch.long)
            found = linear_logprobs(hidden, targets=targets.to(hidden.device), grad="none", **self.head).logprob
            for i, part in zip(members, found.double().cpu().split([sizes[i] for i in members]), strict=True):
                logprobs[i] = part
        return logprobs

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        if self.adapted is None:
            yield
        elif adapter is None:
            with self.adapted.disable_adapter():
                yield
        else:
            self.adapted.set_adapter(adapter)
            yield


class _Said(StoppingCriteria):
    """Ends a text in which another stands."""

    def __init__(self, tokenizer: Any, stop: str, width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.BoolTensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        return torch.tensor([self.stop in text for text in texts], device=input_ids.device)  # type: ignore[return-value]


def _ends(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a text; the model's configuration of its own, which could hold penalties, is put away."""
    own: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    model.generation_config = GenerationConfig()
    many = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return [token for token in dict.fromkeys(many) if token is not None]


def _head(model: PreTrainedModel) -> dict[str, Any]:
    """The LM head as keywords of linear_logprobs."""
    head: Any = model.get_output_embeddings()
    return {"weight": head.weight, "bias": head.bias, **scale_and_cap(model.config.get_text_config())}


@torch.no_grad()
def _check_head(model: Any, head: dict[str, Any], name: str) -> None:
    ids = torch.arange(1, 9, device=model.device) % model.config.get_text_config().vocab_size
    expected = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    hidden = decoder_of(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    found = linear_logprobs(hidden, targets=ids[1:], grad="none", **head).logprob
    difference = (found - expected.gather(1, ids[1:, None])[:, 0]).abs().max().item()
    if broken := why_not_finite(model, difference):
        raise ScorerError(f"{name}: {broken}")
    if not difference <= TOLERANCE.get(hidden.dtype, 0.25):
        raise ScorerError(
            f"{name} ({model.config.model_type}): computes logits in a way that is not supported (its own "
            f"log-probabilities and ours differ by {difference:.2g}); another architecture is needed"
        )
