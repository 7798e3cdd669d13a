"""A tokenizer as llama.cpp reads it: byte-level BPE that cuts texts in a known way, or SentencePiece's."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.errors import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""Patterns that cut a text into words, and llama.cpp's names of them (src/llama-vocab.cpp)."""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_TOKEN = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, size: int) -> None:
    """Add tokens, their kinds, merges or scores, special tokens and the chat template to a GGUF file.

    Args:
        writer: gguf's GGUFWriter.
        folder: the tokenizer's files.
        size: rows of the embeddings; rows without a token become unused ones.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    import gguf

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError("--to gguf: the tokenizer has no tokenizer.json, of which the vocabulary is made")
    read = json.loads(file.read_text(encoding="utf-8"))
    model = read["model"]
    if model["type"] != "BPE":
        raise UserError(f"--to gguf: llama.cpp has no {model['type']} tokenizer as this one; BPE alone can be written")
    spelled = {number: text for text, number in tokenizer.get_vocab().items()}
    tokens = [spelled.get(number, f"[PAD{number}]") for number in range(size)]
    byte_level = (cut := _cut(read)) is not None
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(cut or "default")
    writer.add_token_list(tokens)
    if not byte_level:
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_prefixes_space(read))
    added = {int(token["id"]): bool(token["special"]) for token in read["added_tokens"]}
    writer.add_token_types([_kind(number, spelled, added, str(model.get("unk_token"))) for number in range(size)])
    special = gguf.SpecialVocab(folder, load_merges=byte_level, n_vocab=size)
    special.chat_template = tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)


def _cut(read: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a byte-level tokenizer cuts a text; None for SentencePiece's BPE.

    Raises:
        UserError: it cuts in another way, or there are neither bytes nor SentencePiece's spaces.
    """
    before = read.get("pre_tokenizer") or {}
    parts = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    kinds = [part.get("type") for part in parts]
    if "ByteLevel" not in kinds:
        if read["model"].get("byte_fallback") and SPACE in json.dumps(read, ensure_ascii=False)[:5000]:
            return None
        raise UserError("--to gguf: the tokenizer is neither byte-level BPE nor SentencePiece's, which llama.cpp reads")
    own = parts[kinds.index("ByteLevel")]
    if kinds == ["ByteLevel"] and own.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and own.get("use_regex", True):
        return "smollm"
    pattern = parts[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if pattern in CUTS and not own.get("use_regex", True):
        return CUTS[pattern]
    raise UserError(
        f"--to gguf: the tokenizer cuts texts by {' and '.join(map(str, kinds))} in a way that has no name here "
        f"(known: gpt-2, smollm, {', '.join(CUTS.values())}); convert a --to transformers export by llama.cpp"
    )


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """SentencePiece's order of merges: what is merged earlier scores higher; other tokens are never made."""
    rank = {"".join(pair if isinstance(pair, list) else pair.split(" ")): -float(k) for k, pair in enumerate(merges)}
    return [rank.get(token, -1e6) for token in tokens]


def _prefixes_space(read: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalizer = read.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    before = read.get("pre_tokenizer") or {}
    return any(part.get("type") == "Prepend" for part in parts) or before.get("prepend_scheme") in ("always", "first")


def _kind(number: int, spelled: dict[int, str], added: dict[int, bool], unknown: str) -> int:
    text = spelled.get(number)
    if text is None:
        return UNUSED
    if text == unknown:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number] else USER_DEFINED
    return BYTE_TOKEN if BYTE.fullmatch(text) else NORMAL
