"""Texts as token ids, where what several texts have in common is tokenised once."""

import re
from collections.abc import Callable
from itertools import chain

from transformers import PreTrainedTokenizerBase

Encode = Callable[[list[str]], list[list[int]]]
"""Texts become token ids, nothing added."""
CHUNK = 64
"""Texts per call of the tokenizer, whose own objects hold many times the memory of the ids."""


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """A tokenizer that remembers the pieces of the texts that it has seen, for as long as it is kept.

    A fast tokenizer parts a text at its added tokens before it does anything else, and normalises and splits what
    stands between two of them by itself. So each piece from one of them up to the next has the same tokens in every
    text, and those of a text are its pieces' in a row. Where an added token also reaches for what stands beside it, or
    is looked for in the normalised text only, nothing is parted.

    Settings that another call left behind (truncation, padding) are gone once the tokenizer was called by itself, as
    `special_tokens` does.

    Source: tokenizers' AddedVocabulary.extract_and_normalize
    """
    if not tokenizer.is_fast:
        return lambda texts: (
            tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            if texts
            else []
        )
    parts, known = _parting(tokenizer), dict[str, list[int]]()

    def encode(texts: list[str]) -> list[list[int]]:
        pieces = [_pieces(text, parts) for text in texts]
        new = [*dict.fromkeys(piece for own in pieces for piece in own if piece not in known)]
        for start in range(0, len(new), CHUNK):
            chunk = new[start : start + CHUNK]
            found = tokenizer.backend_tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            known.update(zip(chunk, (own.ids for own in found), strict=True))
        return [known[own[0]] if len(own) == 1 else [*chain(*map(known.__getitem__, own))] for own in pieces]

    return encode


def _pieces(text: str, parts: re.Pattern[str] | None) -> list[str]:
    """A text from each added token up to the next."""
    if parts is None:
        return [text]
    cuts = [0, *(found.start() for found in parts.finditer(text) if found.start()), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


def _parting(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """The added tokens at which a text is parted, the longest first as the tokenizer prefers it; None for nowhere."""
    backend = tokenizer.backend_tokenizer
    added = [own for own in backend.get_added_tokens_decoder().values() if not own.normalized and own.content]
    alone = all(not (own.lstrip or own.rstrip or own.single_word) for own in added)
    if not added or not alone or backend.encode_special_tokens:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted((own.content for own in added), key=len)[::-1]))
