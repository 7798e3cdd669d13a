"""Words tokenised once, many in one text, have the tokens that the tokenizer gives whole texts."""

import json
import random
from itertools import product

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.data import encoding
from align.data.encoding import PATTERNS, encoder

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "GPT-2": GPT2,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    **{
        f"pattern {number}": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(own), "isolated"), BYTES])
        for number, own in enumerate(sorted(PATTERNS))
    },
}
WHOLE = {
    "across": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\S+ \S+|\s+|\S+"), "isolated"), BYTES]),
    "prefixed": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "unsplit": BYTES,
}
"""Those that no space parts."""
SPACES = (" ", " ", "  ", "\n", " \n", "\t", "\r\n", "\u3000", "\xa0", "\x1c", "\u2028")
MARKS = (
    "e\u0301",
    "\u0301",
    "🙂\u200d🙂",
    "<tag>",
    "<the tag>",
    "<ta",
    "<the ta",
    "g>",
    "!",
    "...",
    "/",
    "_",
    "(",
    "。",
    "'",
)
PIECES = (*SPACES, *MARKS, *["a", "the", "don't", "'S", "12345", "½", "日本語", "Z", "ß"])


def built(split, normalizer=None):
    """A tokenizer whose merges, learnt from such texts, reach over whatever the split leaves together."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    draw = random.Random(1)
    backend.train_from_iterator(["".join(draw.choices(PIECES, k=30)) for _ in range(200)], trainer)
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in ("<tag>", "<the tag>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def plainly(tokenizer, texts):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["as it is", "NFC"])
@pytest.mark.parametrize("name", [*SPLITS, *WHOLE])
def test_tokens_of_words_are_those_of_whole_texts(name, normalizer, monkeypatch):
    monkeypatch.setattr(encoding, "REMEMBERED", 200)
    monkeypatch.setattr(encoding, "WORDS", 7)
    tokenizer = built((SPLITS | WHOLE)[name], normalizer)
    encode, draw = encoder(tokenizer), random.Random(name)
    assert isinstance(encode, encoding._Words) == (name in SPLITS)
    for _ in range(60):
        start, *others = ["".join(draw.choices(PIECES, k=draw.randrange(12))) for _ in range(5)]
        texts = [start, start + others[0], start + others[1], others[2], others[2] + others[3], start]
        expected = plainly(tokenizer, texts)
        assert encode(texts) == expected, texts
        borders = sorted(draw.randrange(len(texts[0]) + 1) for _ in range(3))
        heads = plainly(tokenizer, [texts[0][:border] for border in borders])
        assert encode.heads(texts[0], expected[0], borders) == heads, (texts[0], borders)


def test_every_short_text_is_parted_rightly():
    for name, tokenizer in ((name, built(split)) for name, split in SPLITS.items()):
        texts = ["".join(own) for own in product((" ", "\n", "a", "!", "'s", "7", "\u0301"), repeat=4)]
        assert encoder(tokenizer)(texts) == plainly(tokenizer, texts), name


def test_words_whose_bytes_are_not_found_again_are_tokenised_alone(monkeypatch):
    tokenizer = built(GPT2)
    texts = ["the a ½ Z", " 12345 日本語 the"]
    monkeypatch.setattr(encoding, "_bytes", len)
    assert encoder(tokenizer)(texts) == plainly(tokenizer, texts)


def test_model_that_draws_its_merges_is_not_remembered_by_words():
    tokenizer = built(GPT2)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["dropout"] = 0.5
    drawn = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert not isinstance(encoder(drawn), encoding._Words)
