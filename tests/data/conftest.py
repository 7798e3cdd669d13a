"""Small tokenizers of different habits, and a cache of its own for every test."""

from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[3] / "shared" / "data"
CORPUS = ["the cat sat on the mat", "a cat and a dog sat", "once upon a time there was a cat", "the time is ten"] * 4
SPECIALS = ["<pad>", "<s>", "</s>", "<|end|>"]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; the start token is added."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([], trainers.BpeTrainer(special_tokens=SPECIALS, initial_alphabet=alphabet))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens that span words, no start token, and padding is the end token."""
    bpe = Tokenizer(models.BPE())
    bpe.decoder = decoders.Fuse()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIALS, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")


def framing_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words with a marked space, and both a start and an end token around every text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", *SPECIALS], show_progress=False)
    bpe.train_from_iterator([text.replace(" ", "_") for text in CORPUS], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


BUILT = {"bytes": byte_tokenizer, "merging": merging_tokenizer, "framing": framing_tokenizer}
SHARED_MODELS = ("stories260k", "stories3m", "tinystories656k")


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session", params=[*BUILT, *SHARED_MODELS])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param in BUILT:
        return BUILT[request.param]()
    folder = SHARED / "models" / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return AutoTokenizer.from_pretrained(folder)
