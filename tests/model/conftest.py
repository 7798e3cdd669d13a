"""A tiny random model on disk, and lists of token ids for it."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.data.collate import collate
from align.types import ListBatch

VOCABULARY = 40


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A two-layer Llama with random weights large enough to matter, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        attention_dropout=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path, **special: str) -> None:
    """Words w0, w1, ... with <unk>, <s> and </s>; no padding token."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.fixture
def save_tokenizer():
    """Writes a tokenizer into a folder."""
    return _save_tokenizer


@pytest.fixture
def lists() -> list[dict]:
    """Lists of two and three completions of different lengths."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [
        {"prompt_ids": [1, *ids(p)], "completion_ids": [ids(n) for n in sizes], "grades": [float(n) for n in sizes]}
        for p, sizes in ((2, (3, 5)), (4, (1, 2, 6)), (1, (4, 2)))
    ]


@pytest.fixture
def batch(lists) -> ListBatch:
    """All lists in one batch."""
    return collate(lists, pad_id=2)
