"""Texts as token ids, where what several texts have in common is tokenised once."""

import json
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase


class Encode(Protocol):
    """Texts become token ids, nothing added."""

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text."""
        ...

    def heads(self, text: str, ids: list[int], borders: Sequence[int]) -> list[list[int]]:
        """The tokens of a text's beginning up to each of some characters, where `ids` are those of the whole."""
        ...


CHUNK = 64
"""Texts per call of the tokenizer, whose own objects hold many times the memory of the ids."""
WORDS = 4096
"""Words per call, which is for all of them one text."""
REMEMBERED = 2**20
"""Characters of words whose tokens are remembered at most, some 40 MB with these; then it begins anew."""

WORD = re.compile(r"(?s:.[^ ]*(?:(?<=\s) [^ ]*)*)")
"""A text from each space behind what is no white space up to the next."""
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
OPENS = r"[^\r\n\p{L}\p{N}]?"
PATTERNS = frozenset(
    (
        rf"{CONTRACTED}|{OPENS}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+{REST}",
        rf"{CONTRACTED}|{OPENS}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+{REST}",
        rf"{CONTRACTED}|{OPENS}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+{REST}",
    )
)
"""How Llama 3, Qwen 2 and 3, and Qwen 3.5 split a text. No match of theirs goes on from what is no white space to a
space, and none depends on what follows such a space; GPT-2's (ByteLevel's own) is no different."""


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """A tokenizer that remembers what it has tokenised, for as long as it is kept: words, or else pieces of texts.

    A fast tokenizer parts a text at its added tokens before it does anything else, and normalises and splits what
    stands between two of them by itself. So each piece from one of them up to the next has the same tokens in every
    text, and those of a text are its pieces' in a row. Where an added token also reaches for what stands beside it, or
    is looked for in the normalised text only, nothing is parted. Many tokenizers part a piece further, before each
    space behind what is no white space, whatever stands around it; then each such word is tokenised once.

    Settings that another call left behind (truncation, padding) are gone once the tokenizer was called by itself, as
    `special_tokens` does.

    Source: tokenizers' AddedVocabulary.extract_and_normalize
    """
    if not tokenizer.is_fast:
        return _Whole(tokenizer)
    backend = tokenizer.backend_tokenizer
    added = _alone(backend)
    parts = re.compile("|".join(map(re.escape, sorted(added, key=len)[::-1]))) if added else None
    return _Words(backend, parts) if added is not None and _splits_words(backend) else _Pieces(backend, parts)


class _Whole:
    """A tokenizer of Python's, which remembers nothing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> list[list[int]]:
        options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        found: list[list[int]] = self.tokenizer(texts, **options)["input_ids"] if texts else []
        return found

    def heads(self, text: str, ids: list[int], borders: Sequence[int]) -> list[list[int]]:
        return self([text[:border] for border in borders])


class _Pieces:
    """A tokenizer that parts texts at added tokens, with the tokens of the pieces that it has seen."""

    def __init__(self, backend: Any, parts: re.Pattern[str] | None) -> None:
        """Args:
        parts: finds the added tokens; None where nothing is parted.
        """
        self.backend, self.parts = backend, parts
        self.known: dict[str, Sequence[int]] = {}
        self.size = 0
        self.longest = max((len(own.content) for own in backend.get_added_tokens_decoder().values()), default=1)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """A text that goes on from the last that did not, as a row's do from its prompt, has the tokens of that one's
        beginning.
        """
        heads: dict[str, list[str]] = {}
        parted: dict[str, tuple[str, list[str]]] = {}
        base = head = ""
        for text in dict.fromkeys(texts):
            if base and text.startswith(base):
                parted[text] = head, self.pieces(text[len(head) :])
                continue
            own = self.pieces(text)
            count = self._sure(own, len(text))
            base, head = text, "".join(own[:count])
            heads[head], parted[text] = own[:count], (head, own[count:])
        self._learn(chain(chain.from_iterable(heads.values()), *(own for _, own in parted.values())))
        ids = self.known.__getitem__
        begun = {head: [*chain.from_iterable(map(ids, own))] for head, own in heads.items()}
        found = {text: [*begun[head], *chain.from_iterable(map(ids, own))] for text, (head, own) in parted.items()}
        return [found[text] for text in texts]

    def _sure(self, pieces: list[str], size: int) -> int:
        """How many pieces of a text are the same in any that goes on from it: no added token reaches over their end."""
        return bisect_right([*accumulate(map(len, pieces))], size - self.longest)

    def heads(self, text: str, ids: list[int], borders: Sequence[int]) -> list[list[int]]:
        """Up to the piece that a border is in, a text's beginning has the tokens of the whole."""
        pieces = self.pieces(text)
        self._learn(pieces)
        starts = [0, *accumulate(map(len, pieces))]
        counts = [0, *accumulate(len(self.known[own]) for own in pieces)]
        cut = [self._cut(text, starts, border) for border in borders]
        rest = self([text[starts[own] : border] for own, border in zip(cut, borders, strict=True)])
        return [[*ids[: counts[own]], *tail] for own, tail in zip(cut, rest, strict=True)]

    def _cut(self, text: str, starts: list[int], border: int) -> int:
        """The piece that a border is in; the first for one inside an added token, which is then none."""
        piece = max(bisect_left(starts, border) - 1, 0)
        found = self.parts and self.parts.match(text, starts[piece])
        return 0 if found and border < found.end() else piece

    def _learn(self, pieces: Iterable[str]) -> None:
        if self.size > REMEMBERED:
            self.known, self.size = {}, 0
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self.known]
        self.size += sum(map(len, new))
        self.known.update(zip(new, self.tokens(new), strict=True))

    def pieces(self, text: str) -> list[str]:
        """A text from each added token up to the next."""
        if self.parts is None:
            return [text]
        cuts = [0, *(found.start() for found in self.parts.finditer(text) if found.start()), len(text)]
        return [text[start:end] for start, end in pairwise(cuts)]

    def tokens(self, pieces: list[str]) -> Iterator[Sequence[int]]:
        """The tokens of each by itself."""
        for start in range(0, len(pieces), CHUNK):
            found = self.backend.encode_batch_fast(pieces[start : start + CHUNK], add_special_tokens=False)
            yield from (tuple(own.ids) for own in found)  # of numbers, so no work for the garbage collector


class _Words(_Pieces):
    """A tokenizer that parts texts at spaces too."""

    def __init__(self, backend: Any, parts: re.Pattern[str] | None) -> None:
        super().__init__(backend, parts)
        self.lengths = _Lengths(backend)
        self.composes = backend.normalizer is not None

    def pieces(self, text: str) -> list[str]:
        """The words of a text; an added token is one."""
        words: list[str] = []
        start = 0
        for found in self.parts.finditer(text) if self.parts else ():
            words += WORD.findall(text, start, found.start())
            words.append(found[0])
            start = found.end()
        return words + WORD.findall(text, start)

    def tokens(self, words: list[str]) -> Iterator[Sequence[int]]:
        """The tokens of each: those that stand between spaces from one text, the others by themselves."""
        between = [word for word in words if word[0] == " " and not word[-1].isspace()]
        others = [word for word in words if word[0] != " " or word[-1].isspace()]
        known: dict[str, Sequence[int]] = dict(zip(others, super().tokens(others), strict=True))
        for start in range(0, len(between), WORDS):
            chunk = between[start : start + WORDS]
            known.update(zip(chunk, self._in_a_row(chunk), strict=True))
        return map(known.__getitem__, words)

    def _in_a_row(self, words: list[str]) -> Iterator[Sequence[int]]:
        """The tokens of words that are tokenised as one text: each has as many bytes as its tokens have letters."""
        ids = self.backend.encode_batch_fast(["".join(words)], add_special_tokens=False)[0].ids
        behind = {end: count for count, end in enumerate(accumulate(map(self.lengths.__getitem__, ids)), start=1)}
        normal = (_composed(word) for word in words) if self.composes else words
        ends = [behind.get(end) for end in accumulate(map(_bytes, normal))]
        if None in ends or ends[-1] != len(ids):
            return super().tokens(words)
        return (tuple(ids[start:end]) for start, end in pairwise([0, *ends]))


class _Lengths(dict[int, int]):
    """How many letters a token of ByteLevel's alphabet has, where each is a byte."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend = backend

    def __missing__(self, token: int) -> int:
        self[token] = len(self.backend.id_to_token(token))
        return self[token]


def _bytes(word: str) -> int:
    return len(word) if word.isascii() else len(word.encode())


def _composed(word: str) -> str:
    return unicodedata.normalize("NFC", word)


def _alone(backend: Any) -> list[str] | None:
    """The added tokens at which a text is parted; None where one of them looks for more than itself."""
    added = [own for own in backend.get_added_tokens_decoder().values() if not own.normalized and own.content]
    alone = all(not (own.lstrip or own.rstrip or own.single_word) for own in added)
    return [own.content for own in added] if alone and not backend.encode_special_tokens else None


def _splits_words(backend: Any) -> bool:
    """Whether the tokens of a text are those of its words in a row.

    NFC composes nothing with a space, which is where a word begins.
    """
    if type(backend.model) is not BPE or backend.model.dropout:
        return False
    if any(own.normalized for own in backend.get_added_tokens_decoder().values()):
        return False
    if backend.normalizer is not None and _state(backend.normalizer)["type"] != "NFC":
        return False
    if backend.pre_tokenizer is None:
        return False
    splits = _state(backend.pre_tokenizer)
    *before, last = splits["pretokenizers"] if splits["type"] == "Sequence" else [splits]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or not all(map(_parts_words, before)):
        return False
    return bool(last["use_regex"]) or any(own["type"] == "Split" for own in before)


def _parts_words(split: dict[str, Any]) -> bool:
    """Whether a step before ByteLevel's parts a text before each of its words, and looks at each by itself."""
    if split["type"] == "Digits":
        return True
    own = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    return own and split["pattern"].get("Regex") in PATTERNS


def _state(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(part.__getstate__())
    return found
