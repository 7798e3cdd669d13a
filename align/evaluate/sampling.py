"""Completions sampled from a policy by transformers' `generate`, each a function of its own prompt and the seed."""

import hashlib
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from align.model.forward import evaluating

Policy = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Sampled:
    """One completion as it was drawn."""

    ids: list[int]
    """Its tokens, the one that ended it included."""
    logprobs: list[float]
    """Of each token, in nats, under the distribution that it was drawn from: tempered and filtered."""
    ended: bool
    """By an end token or a stop string, not by its length."""
    raw_logprobs: list[float] | None = None
    """Of each token, in nats, under the policy itself: no temperature, no filter; None where they were not kept."""
    entropies: list[float] | None = None
    """Of the policy's distribution at each token, in nats; likewise."""


def sample_completions(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    *,
    per_prompt: int = 1,
    advance: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> list[list[str]]:
    """`sample_tokens` as texts.

    Args:
        model, tokenizer, prompt_ids, per_prompt, options: as for `sample_tokens`.
        advance: told of every completion.

    Returns:
        `per_prompt` texts for each prompt, without special tokens; a text is empty where the end came at once.

    Source: ours
    """
    texts = [[""] * per_prompt for _ in prompt_ids]
    ends = end_ids(model, tokenizer)
    for prompt, sample, sampled in sample_tokens(model, tokenizer, prompt_ids, per_prompt=per_prompt, **options):
        texts[prompt][sample] = completion_text(tokenizer, prompt_ids[prompt], sampled.ids, ends)
        advance(1)
    return texts


@torch.no_grad()
def sample_tokens(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    adaptive_temperature: bool = False,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    per_prompt: int = 1,
    tokens_per_batch: int = 8192,
    done: Container[int] = (),
    watch: Callable[[list[str]], None] | None = None,
) -> Iterator[tuple[int, int, Sampled]]:
    """Sample completions; a row's token is argmax_v (logit_v / temperature + Gumbel noise), which samples the softmax.

    The noise of a row follows from (seed, its prompt's tokens, which sample of the prompt it is), so a completion does
    not depend on the prompts beside it, their order or the batch size, up to rounding of the logits. Equal prompts get
    equal completions; ask for several by `per_prompt`. Neither torch's random state nor the model's mode changes.

    Args:
        model: The policy, wrapped in an adapter or not.
        tokenizer: Turns tokens into text; its end token and those of the model's generation configuration end a text.
        prompt_ids: Each prompt's tokens, at least one, start token included.
        max_tokens: Length of a completion at most, the end token included.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only this many of the likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that reach this probability together.
        min_p: Only tokens at least this likely relative to the likeliest; 0 for all.
        adaptive_temperature: Divide by less where the policy is uncertain; see `sharpness`.
        stop: Texts that end a completion where they appear in it.
        stop_ids: Tokens that end it, besides the end tokens.
        seed: Of all noise.
        per_prompt: Completions of each prompt; they are all the same where the temperature is 0.
        tokens_per_batch: Rows times (prompt and completion) tokens of one `generate` at most.
        done: Prompts whose completions are not wanted; a batch that has others too is the same as without this.
        watch: Told, after every token, what the batch's rows have written so far.

    Returns:
        (prompt, sample, completion) as batches finish, the longest prompts first.

    Source: ours (the Gumbel-max trick)
    """
    rows = [(prompt, sample) for prompt in range(len(prompt_ids)) for sample in range(per_prompt)]
    ends = [*end_ids(model, tokenizer), *stop_ids]
    for batch in _batches(rows, [len(ids) + max_tokens for ids in prompt_ids], tokens_per_batch):
        if all(prompt in done for prompt, _ in batch):
            continue
        prompts = [prompt_ids[prompt] for prompt, _ in batch]
        seeds = [row_seed(seed, prompt_ids[prompt], sample) for prompt, sample in batch]
        noise = GumbelNoise(seeds, temperature, top_k, top_p, model.device, min_p, adaptive=adaptive_temperature)
        with evaluating(model):
            drawn = _generate(model, tokenizer, prompts, max_tokens, noise, ends, stop, watch)
        for (prompt, sample), sampled in zip(batch, drawn, strict=True):
            if prompt not in done:
                yield prompt, sample, sampled


class GumbelNoise(LogitsProcessor):
    """Makes the greedy choice a sample: scales and filters the logits, then adds each row's own Gumbel noise.

    `figures` holds, for each step, what `Sampled` says of the token that each row draws: its log-probability as drawn
    (at temperature 0 under the softmax) and under the policy itself, and the policy's entropy.
    """

    def __init__(
        self,
        seeds: list[int],
        temperature: float,
        top_k: int,
        top_p: float,
        device: torch.device | str,
        min_p: float = 0.0,
        *,
        adaptive: bool = False,
    ) -> None:
        self.temperature, self.adaptive = temperature, adaptive
        self.filters: list[Callable[..., Tensor]] = []
        if min_p > 0:
            self.filters.append(MinPLogitsWarper(min_p))
        if top_k > 0:
            self.filters.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.filters.append(TopPLogitsWarper(top_p))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.figures: list[Float[Tensor, "R 3"]] = []

    def __call__(self, input_ids: Int[Tensor, "R T"], scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        if self.temperature == 0:
            return self._drawn(scores, scores, scores)
        noise = [
            torch.empty_like(row).exponential_(generator=g) for row, g in zip(scores, self.generators, strict=True)
        ]
        logits = scores / self.temperature
        if self.adaptive:
            logits = logits * sharpness(scores)
        for keep in self.filters:
            logits = keep(input_ids, logits)
        return self._drawn(logits - torch.stack(noise).log(), logits, scores)

    def _drawn(
        self, noisy: Float[Tensor, "R V"], logits: Float[Tensor, "R V"], scores: Float[Tensor, "R V"]
    ) -> Float[Tensor, "R V"]:
        token = noisy.argmax(-1, keepdim=True)
        drawn, policy = (rows.float().log_softmax(-1) for rows in (logits, scores))
        entropy = -torch.special.xlogy(policy.exp(), policy.exp()).sum(-1, keepdim=True)
        self.figures.append(torch.cat([drawn.gather(-1, token), policy.gather(-1, token), entropy], 1))
        return noisy


SHARPNESS = (-0.037, 0.481, -2.3, 4.917, -1.791)
"""Coefficients of the entropy's powers, the fourth first, as the paper fitted them."""


def sharpness(logits: Float[Tensor, "R V"]) -> Float[Tensor, "R 1"]:
    """What the logits are multiplied by where many tokens compete, over which a softmax spreads out whatever they are.

    max(1, polynomial of the entropy in nats): 1 to 0.85 nats, up to 2.4, and 1 again from 6 nats on.

    Source: arXiv:2410.01104, algorithm 1 (as published code has it), which fits it to a task of finding a maximum.
    """
    p = logits.float().softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
    factor = torch.zeros_like(entropy)
    for coefficient in SHARPNESS:
        factor = factor * entropy + coefficient
    return factor.clamp_min(1)


class _StopTexts(StoppingCriteria):
    """Ends a row where one of the texts appears in its completion; `lengths` says after how many tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Int[Tensor, "R T"], scores: Any, **_: Any) -> Bool[Tensor, " R"]:
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if row not in self.lengths and any(stop in text for stop in self.stop):
                self.lengths[row] = len(ids)
        return torch.tensor([row in self.lengths for row in range(len(input_ids))], device=input_ids.device)


class _Watched(StoppingCriteria):
    """Ends nothing; tells what was written so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, watch: Any, width: int) -> None:
        self.tokenizer, self.watch, self.width = tokenizer, watch, width

    def __call__(self, input_ids: Int[Tensor, "R T"], scores: Any, **_: Any) -> Bool[Tensor, " R"]:
        self.watch(self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_tokens: int,
    noise: GumbelNoise,
    ends: list[int],
    stop: Sequence[str],
    watch: Callable[[list[str]], None] | None,
) -> list[Sampled]:
    """Each row's completion, from a left-padded batch; what follows a row's end token is padding."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True
    )
    stops = _StopTexts(tokenizer, stop, width)
    criteria = [stops] * bool(stop) + [_Watched(tokenizer, watch, width)] * bool(watch)
    with _without_its_configuration(model):
        output = model.generate(  # type: ignore[operator]  # transformers keeps it outside PreTrainedModel
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([noise]),
            stopping_criteria=StoppingCriteriaList(criteria),
        )
    figures = torch.stack(noise.figures, -1)
    drawn = []
    for row, ids in enumerate(output[:, width:].tolist()):
        end = next((i for i, token in enumerate(ids, start=1) if token in ends), None)
        length = min(end or len(ids), stops.lengths.get(row, len(ids)))
        ended = end is not None or row in stops.lengths
        logprobs, raw_logprobs, entropies = figures[row, :, :length].tolist()
        drawn.append(Sampled(ids[:length], logprobs, ended, raw_logprobs, entropies))
    return drawn


@contextmanager
def _without_its_configuration(model: Policy) -> Iterator[None]:
    """While this lasts the model has no generation configuration: what is not asked for would come from it, such as
    penalties, forbidden and forced tokens, or a least length."""
    own: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kept, own.generation_config = own.generation_config, GenerationConfig()
    try:
        yield
    finally:
        own.generation_config = kept


def end_ids(model: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's and those of the model's generation configuration."""
    configured = model.generation_config.eos_token_id
    many = configured if isinstance(configured, list) else [configured]
    return [end for end in dict.fromkeys([tokenizer.eos_token_id, *many]) if end is not None]


def completion_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    completion: list[int],
    ends: Sequence[int],
    stop: Sequence[str] = (),
) -> str:
    """What the completion adds to the prompt's text, up to its end token or stop text.

    The two are decoded together: some tokenizers drop a leading space when they decode a completion alone.
    """
    if completion and completion[-1] in ends:
        completion = completion[:-1]
    both = str(tokenizer.decode(prompt + completion, skip_special_tokens=True))
    text = both[len(tokenizer.decode(prompt, skip_special_tokens=True)) :]
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def row_seed(seed: int, prompt: list[int], sample: int) -> int:
    """A seed that follows from another one, a prompt's tokens and a number; below 2^56."""
    digest = hashlib.blake2b(repr((seed, prompt, sample)).encode(), digest_size=7).digest()
    return int.from_bytes(digest)


def _batches(rows: list[tuple[int, int]], lengths: list[int], tokens_per_batch: int) -> Iterator[list[tuple[int, int]]]:
    """Rows (prompt, sample) by length, the longest first, as many at once as the token budget allows."""
    batch: list[tuple[int, int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row[0]]):
        if batch and (len(batch) + 1) * lengths[batch[0][0]] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
