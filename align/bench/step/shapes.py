"""Models of random weights in the shapes of known ones, and lists of random tokens."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.packing.batch import Example

Lengths = tuple[tuple[int, int], tuple[int, int]]

QWEN = {"tie_word_embeddings": False, "vocab_size": 151936}
SHAPES: dict[str, dict[str, Any]] = {
    "256x4 V=32k": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 32000, "intermediate_size": 688}
    | {"num_attention_heads": 4, "num_key_value_heads": 4},
    "512x8 V=152k": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 151936, "intermediate_size": 1376}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "576x30 V=49k": {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "intermediate_size": 1536}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}
GPU_SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": QWEN
    | {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2.5-1.5B": QWEN
    | {"hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2.5-7B": QWEN
    | {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
}
PAIRS = {"256x4 V=32k": 4, "512x8 V=152k": 2, "576x30 V=49k": 2} | dict.fromkeys(GPU_SHAPES, 8)
"""Pairs of a batch at K = 2."""
USUAL = ((128, 512), (32, 256))
"""Shortest and longest prompts and completions."""
CHAT = ((32, 128), (64, 512))


def pairs_of(example: Example) -> Iterator[dict[str, list[int]]]:
    """All pairs of a list whose completions come with falling grades."""
    for better, worse in combinations(example["completion_ids"], 2):
        yield {"prompt_ids": example["prompt_ids"], "chosen_ids": better, "rejected_ids": worse}


def random_lists(shape: str, count: int, seed: int, lengths: Lengths = USUAL, k: int = 2) -> Iterator[Example]:
    """Lists whose prompts and completions have log-uniform lengths."""
    generator = torch.Generator().manual_seed(100 + seed)

    def length(low: int, high: int) -> int:
        return round(low * (high / low) ** torch.rand((), generator=generator).item())

    for place in range(count):
        yield random_list(shape, length(*lengths[0]), [length(*lengths[1]) for _ in range(k)], 1000 * seed + place)


def random_list(shape: str, prompt: int, completions: list[int], seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = (SHAPES | GPU_SHAPES)[shape]["vocab_size"]
    sizes = [prompt, *completions]
    prompt_ids, *ids = (torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in sizes)
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "grades": [float(-place) for place in range(len(ids))]}


def save(folder: Path, shape: str) -> None:
    """A model of random weights and a tokenizer of a few words, in a folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SHAPES | GPU_SHAPES)[shape], bos_token_id=1, eos_token_id=2))
    model.bfloat16().float().save_pretrained(folder)  # weights that bfloat16 holds, as those of published models
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
