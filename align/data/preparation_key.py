"""Under which name a preparation is kept: a digest of all that its rows and tokens depend on."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
import transformers
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

import align.lint
import rewards.templates
from align.data.admit import Wanted
from align.data.config import DataSection, SourceSection
from align.data.dataset_info import INFO, descriptions
from align.data.files import SUFFIXES
from align.data.kept import known_digest
from align.data.sources import BOOKKEEPING, hub_table
from align.errors import UserError
from rewards.rendering import rendered
from rewards.templates import VOLATILE

FREE = {"workers", "stop_on", "ches", "cache"}
"""Keys of `data` that change no row and no token."""
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def preparation_key(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, wanted: Wanted
) -> str | None:
    """A digest of the files' content, the recipe's keys that matter, the tokenizer and our own code.

    None where a chat template may write another text at any moment, as with chance in it, where a source cannot be
    read, and where `data.cache` is off. A template's date belongs to the key.
    """
    clock = _clock(tokenizer, chat_template)
    if clock is None or not section.cache:
        return None
    try:
        content = [list(_content(own)) for own in (*section.sources, *section.eval_sources)]
    except (OSError, UserError):  # reading says it in its turn
        return None
    keys = section.model_dump(mode="json", exclude=FREE)
    rest = {name: own for name, own in asdict(wanted).items() if name not in _idle(section, wanted)}
    digest = hashlib.sha256()
    for part in (content, keys, rest, tokenizer_state(tokenizer), chat_template, clock, _code(), _versions()):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _idle(section: DataSection, wanted: Wanted) -> set[str]:
    """What is wanted that changes no row and no token here: a seed, where it holds no rows out and reduces no lists."""
    chooses = section.eval_fraction and not section.eval_sources
    reduces = wanted.imitate or section.select != "all" or section.list_size is not None
    return {"every_check"} if chooses or reduces else {"every_check", "seed"}


def _content(source: SourceSection) -> Iterator[tuple[str, str]]:
    """Names and digests of all files that a source may be read from."""
    place = Path(source.path).expanduser()
    if not place.exists():
        table = hub_table(source.path, source.split, source.revision, source.config)
        yield source.path, table._fingerprint
        return
    files = {place, place.parent / INFO} if place.is_file() else set(_files_of(place))
    for file in sorted(files):
        if file.is_file():
            yield str(file), known_digest(file)


def _files_of(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.name.endswith(SUFFIXES) or file.name in BOOKKEEPING:
            yield file
    for own in descriptions(folder).values():
        place = folder / str(own.get("file_name"))
        yield from place.rglob("*") if place.is_dir() else [place]


def _clock(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> list[str] | None:
    """What the dates in a chat template are now; None where it may give another text at any time."""
    every = tokenizer.chat_template if chat_template is None else chat_template
    text = "\n".join(every.values() if isinstance(every, dict) else [every or ""])
    formats = sorted({match[2] for match in CLOCK.finditer(text)})
    if VOLATILE.search(re.sub(r"strftime_now is (not )?defined", "", CLOCK.sub("", text))):
        return None
    message = [{"role": "user", "content": ""}]
    asked = ("{{ strftime_now(" + json.dumps(own) + ") }}" for own in formats)
    return [rendered(tokenizer, message, chat_template=own) for own in asked]


@lru_cache(maxsize=1)
def _code() -> list[str]:
    """The modules between a file and its token ids and audit."""
    roots = [Path(__file__).parent, Path(align.lint.__file__).parent, Path(rewards.templates.__file__).parent]
    return [file.read_text(encoding="utf-8") for root in roots for file in sorted(root.rglob("*.py"))]


def _versions() -> list[str]:
    return [transformers.__version__, tokenizers.__version__, jinja2.__version__]


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that its token ids depend on."""
    if not tokenizer.is_fast:
        return [Hasher.hash(tokenizer), tokenizer.chat_template]
    return [
        _text_of(tokenizer.backend_tokenizer),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer.split_special_tokens,
    ]


def _text_of(backend: Any) -> str:
    """A fast tokenizer's file, without truncation and padding: settings of the last call, and left as they were."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    text = str(backend.to_str())
    if truncation:
        backend.enable_truncation(**truncation)
    if padding:
        backend.enable_padding(**padding)
    return text
