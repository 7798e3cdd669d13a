"""Rows of token ids, alone or beside their texts."""

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.lists import Lists
from align.data.parts import PROMPTS, list_grades, parts_of, single_grade, take
from align.data.schema import is_token_ids


@FORMAT.add
class TokenIds(Format):
    """Token ids of a prompt and of a list, a pair (`chosen_ids`, `rejected_ids`) or one completion, with any grades."""

    name = "token_ids"
    shape = "{prompt_ids, completions_ids, grades}"
    needs = ("prompt_ids",)
    before = ("sampled",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return "prompt_ids" in columns and not Sampled.detect(columns)

    @staticmethod
    def read(columns: Columns) -> Columns:
        prompt = columns.pop("prompt_ids")
        if "chosen_ids" in columns:
            completions = [columns.pop("chosen_ids"), take(columns, "rejected_ids")]
            return parts_of(prompt, completions, ("chosen_ids", "rejected_ids"), grades=[1.0, 0.0])
        name = "completions_ids" if "completions_ids" in columns else "completion_ids"
        completions = take(columns, name)
        if is_token_ids(completions):
            return parts_of(prompt, [completions], (name,), **single_grade(columns))
        return parts_of(prompt, completions, f"{name}[{{}}]", **list_grades(columns))


@FORMAT.add
class Sampled(Format):
    """A policy's own samples with their token ids, as `align rollout` writes them."""

    name = "sampled"
    shape = "{prompt, completions, prompt_ids, completion_ids, rewards}"
    keeps = ("sampled_logprobs", "raw_logprobs", "entropies", "ended", "policy_version")
    needs = ("completions", "prompt_ids")
    before = ("items",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        return "completions" in columns and "prompt_ids" in columns and any(name in columns for name in PROMPTS)

    @staticmethod
    def read(columns: Columns) -> Columns:
        ids = {name: take(columns, name) for name in ("prompt_ids", "completion_ids")}
        return {**Lists.read(columns), **ids}
