"""Under which name tokens are kept: a digest of all that they depend on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

import rewards.templates
from rewards.templates import VOLATILE


def is_volatile(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> bool:
    """Whether a conversation may be rendered differently at another time; its text then belongs to the key."""
    every = tokenizer.chat_template if chat_template is None else chat_template
    texts = every.values() if isinstance(every, dict) else [every or ""]
    return any(VOLATILE.search(text) for text in texts)


def tokens_key(content: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """A digest of all that the token ids depend on, our own code included."""
    files = [*Path(__file__).parent.glob("*.py"), Path(rewards.templates.__file__)]
    code = [file.read_text(encoding="utf-8") for file in sorted(files) if file.name in CODE]
    versions = [transformers.__version__, tokenizers.__version__, jinja2.__version__]
    digest = hashlib.sha256()
    for part in (content, _tokenizer_state(tokenizer), options, code, versions):
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:32]


CODE = {"tokenize.py", "rendering.py", "texts.py", "boundary.py", "contrast.py", "templates.py"}
"""The modules between a row and its token ids."""


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    if not tokenizer.is_fast:
        return [Hasher.hash(tokenizer), tokenizer.chat_template]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}  # settings of the last call, not of the tokenizer
    return [state, tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.split_special_tokens]
