"""Completions sampled from a policy by transformers' `generate`, each a function of its own prompt and the seed."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

Policy = PreTrainedModel | PeftModel


@torch.no_grad()
def sample_completions(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    per_prompt: int = 1,
    tokens_per_batch: int = 8192,
) -> list[list[str]]:
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
        seed: Of all noise.
        per_prompt: Completions of each prompt; they are all the same where the temperature is 0.
        tokens_per_batch: Rows times (prompt and completion) tokens of one `generate` at most.

    Returns:
        `per_prompt` texts for each prompt, without special tokens; a text is empty where the end came at once.

    Source: ours (the Gumbel-max trick)
    """
    rows = [(prompt, sample) for prompt in range(len(prompt_ids)) for sample in range(per_prompt)]
    texts = [[""] * per_prompt for _ in prompt_ids]
    was_training = model.training
    model.eval()
    for batch in _batches(rows, [len(ids) + max_tokens for ids in prompt_ids], tokens_per_batch):
        prompts = [prompt_ids[prompt] for prompt, _ in batch]
        seeds = [_row_seed(seed, prompt_ids[prompt], sample) for prompt, sample in batch]
        noise = GumbelNoise(seeds, temperature, top_k, top_p, model.device) if temperature > 0 else None
        for (prompt, sample), ids in zip(batch, _generate(model, tokenizer, prompts, max_tokens, noise), strict=True):
            texts[prompt][sample] = _completion_text(tokenizer, prompt_ids[prompt], ids)
    model.train(was_training)
    return texts


class GumbelNoise(LogitsProcessor):
    """Makes the greedy choice a sample: filters and scales the logits, then adds each row's own Gumbel noise."""

    def __init__(
        self, seeds: list[int], temperature: float, top_k: int, top_p: float, device: torch.device | str
    ) -> None:
        self.temperature = temperature
        self.filters: list[Callable[..., Tensor]] = []
        if top_k > 0:
            self.filters.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.filters.append(TopPLogitsWarper(top_p))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Int[Tensor, "R T"], scores: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        noise = [
            torch.empty_like(row).exponential_(generator=g) for row, g in zip(scores, self.generators, strict=True)
        ]
        logits = scores / self.temperature
        for keep in self.filters:
            logits = keep(input_ids, logits)
        return logits - torch.stack(noise).log()


def _generate(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_tokens: int,
    noise: GumbelNoise | None,
) -> list[list[int]]:
    """Each row's new tokens, from a left-padded batch; what follows a row's end token is padding."""
    ends = _end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    # What is not set here would come from the model's own generation configuration.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        repetition_penalty=1.0,
        use_cache=True,
    )
    processors = LogitsProcessorList([noise] if noise else [])
    output = model.generate(  # type: ignore[operator]  # transformers keeps it outside PreTrainedModel
        input_ids=input_ids, attention_mask=mask, generation_config=config, logits_processor=processors
    )
    return [_until_end(row, ends) for row in output[:, width:].tolist()]


def _end_ids(model: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id
    many = configured if isinstance(configured, list) else [configured]
    return [end for end in dict.fromkeys([tokenizer.eos_token_id, *many]) if end is not None]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _completion_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int]) -> str:
    """What the completion adds to the prompt's text; some tokenizers drop a leading space when they decode it alone."""
    both = str(tokenizer.decode(prompt + completion, skip_special_tokens=True))
    return both[len(tokenizer.decode(prompt, skip_special_tokens=True)) :]


def _row_seed(seed: int, prompt: list[int], sample: int) -> int:
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
