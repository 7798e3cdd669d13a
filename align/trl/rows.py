"""Rows of preferences -> token ids, exactly as TRL 1.16 makes them, and its collator."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from datasets import Dataset
from transformers.data.data_collator import DataCollatorMixin

log = logging.getLogger("align")

TEXT_KEYS = ("prompt", "chosen", "rejected", "completion", "messages")


def is_conversational(row: Mapping[str, Any]) -> bool:
    """Whether a row's texts are lists of messages."""
    values = [row[key] for key in TEXT_KEYS if key in row]
    return any(isinstance(v, list) and v and isinstance(v[0], dict) and "role" in v[0] for v in values)


def extract_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The beginning that chosen and rejected share as the prompt, in characters or in messages."""
    chosen, rejected = row["chosen"], row["rejected"]
    place = 0
    for place in range(min(len(chosen), len(rejected))):
        if chosen[place] != rejected[place]:
            place -= chosen[place - 1] == " "
            break
    return {"prompt": chosen[:place], "chosen": chosen[place:], "rejected": rejected[place:]}


def with_end(row: dict[str, Any], end: str, columns: Sequence[str]) -> dict[str, Any]:
    """Texts with the end-of-sequence token behind them, once."""
    return {name: row[name] if row[name].endswith(end) else row[name] + end for name in columns if name in row}


def token_ids(tokenizer: Any, text: str | list, **options: Any) -> list[int]:
    """A text, or messages through the chat template."""
    if isinstance(text, list):
        return tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options)["input_ids"]
    return tokenizer(text=text)["input_ids"]


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tools and keywords that a row has for the chat template."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def common_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with together."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class Tokenize:
    """A row of text -> prompt_ids and the ids of each completion; the prompt ends where they part."""

    def __init__(self, tokenizer: Any, completions: Sequence[str], *, prompt_tokens: int | None, tokens: int | None):
        """Args:
        completions: columns, such as chosen and rejected.
        prompt_tokens: the prompt keeps its last so many.
        tokens: of a completion, which keeps its first so many.
        """
        self.tokenizer, self.completions = tokenizer, tuple(completions)
        self.prompt_tokens, self.tokens = prompt_tokens, tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if is_conversational(row):
            options = template_options(row)
            prompt = token_ids(self.tokenizer, row["prompt"], add_generation_prompt=True, **options)
        else:
            options = {}
            prompt = token_ids(self.tokenizer, row["prompt"])
        wholes = [token_ids(self.tokenizer, row["prompt"] + row[name], **options) for name in self.completions]
        length = min(common_beginning(prompt, whole) for whole in wholes)
        start = max(0, length - self.prompt_tokens) if self.prompt_tokens else 0
        ids: dict[str, Any] = {"prompt_ids": prompt[start:length], "prompt_lost": len(prompt) - length}
        for name, whole in zip(self.completions, wholes, strict=True):
            ids[f"{name}_ids"] = whole[length:][: self.tokens]
        return ids


def tell_lost(dataset: Any, name: str) -> Any:
    """Count the rows whose prompt alone is rendered otherwise than before a completion; the count's column goes."""
    if not isinstance(dataset, Dataset):
        return dataset.remove_columns("prompt_lost")
    if lost := sum(n > 0 for n in dataset["prompt_lost"]):
        log.warning(
            "%s: in %d of %d rows the prompt's last tokens are others than before a completion (a chat template that "
            "renders them differently, or tokens that merge); the completion begins where they part",
            name,
            lost,
            len(dataset),
        )
    return dataset.remove_columns("prompt_lost")


def keep_short(dataset: Any, limit: int, name: str, **options: Any) -> Any:
    """Leave out rows whose prompt alone fills `limit`, with a count where they can be counted."""
    kept = dataset.filter(lambda ids: len(ids) < limit, input_columns="prompt_ids", **options)
    if isinstance(dataset, Dataset) and len(kept) < len(dataset):
        log.warning(
            "%s: %d rows are left out, whose prompt has %d tokens or more", name, len(dataset) - len(kept), limit
        )
    return kept


def keep_learnt(dataset: Any, sides: Sequence[str], name: str, **options: Any) -> Any:
    """Leave out pairs of which a side has no token left to learn, with a count where they can be counted."""
    columns = [f"{side}_labels" for side in sides]
    kept = dataset.filter(
        lambda *labels: all(any(label != -100 for label in own) for own in labels), input_columns=columns, **options
    )
    if isinstance(dataset, Dataset) and len(kept) < len(dataset):
        left = len(dataset) - len(kept)
        log.warning("%s: %d pairs are left out, whose prompt alone fills max_length", name, left)
    return kept


def pad(rows: Sequence[torch.Tensor], value: int, multiple: int | None = None) -> torch.Tensor:
    """Rows of one dimension as one tensor, filled on the right."""
    width = max(map(len, rows))
    width += -width % multiple if multiple else 0
    padded = torch.full((len(rows), width), value, dtype=rows[0].dtype)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


@dataclass
class DataCollatorForPreference(DataCollatorMixin):
    """Pairs of token ids -> 2B right-padded rows, the chosen ones first.

    Takes `prompt_ids`, `chosen_ids`, `rejected_ids` and, where there are, `ref_chosen_logps` and `ref_rejected_logps`.
    Gives `input_ids`, `attention_mask`, `completion_mask` [2B, T] and the reference's values [B].
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                f"Unsupported truncation mode: {self.truncation_mode}, expected 'keep_start' or 'keep_end'"
            )
        ids, masks = [], []
        for name in ("chosen_ids", "rejected_ids"):
            ids += [self._cut(e["prompt_ids"] + e[name]) for e in examples]
            masks += [self._cut([0] * len(e["prompt_ids"]) + [1] * len(e[name])) for e in examples]
        rows = [torch.tensor(row, dtype=torch.long) for row in ids]
        batch = {
            "input_ids": pad(rows, self.pad_token_id, self.pad_to_multiple_of),
            "attention_mask": pad([torch.ones_like(row) for row in rows], 0, self.pad_to_multiple_of),
            "completion_mask": pad([torch.tensor(m, dtype=torch.long) for m in masks], 0, self.pad_to_multiple_of),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([e[name] for e in examples])
        return batch

    def _cut(self, row: list[int]) -> list[int]:
        if self.max_length is None:
            return row
        return row[: self.max_length] if self.truncation_mode == "keep_start" else row[-self.max_length :]
