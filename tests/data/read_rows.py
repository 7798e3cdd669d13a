"""Rows from sources to token ids, told what a recipe's `data` section and its task would tell."""

from dataclasses import fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data import Prepared, Wanted, prepare_data
from align.data.config import DataSection

WANTED = {field.name for field in fields(Wanted)}


def read_rows(
    *sources: Any, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, **keys: Any
) -> Prepared:
    """Args:
    sources: paths, or sections of sources.
    keys: of the `data` section, or of `Wanted`.
    """
    wanted = Wanted(**{name: value for name, value in keys.items() if name in WANTED})
    section = DataSection(sources=sources, **{name: value for name, value in keys.items() if name not in WANTED})
    return prepare_data(section, tokenizer, chat_template=chat_template, wanted=wanted)
