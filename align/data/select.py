"""Which rows are held out, and which completions of a list are trained on; both follow from the seed alone."""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from align.data.schema import Row, Text, changed

_KEY = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
Selection = Literal["all", "best_worst", "best"]


def hold_out(prompts: Any, fraction: float) -> Any:
    """Which rows are held out; all rows of a prompt land on the same side.

    The prompts with the smallest digests are held out, so the choice does not depend on the rows' order.

    Args:
        prompts: [N] of numpy's type S16, every row's `prompt_digest`; another seed there holds out other prompts.
        fraction: share of the distinct prompts to hold out, in [0, 1); a positive one holds out at least one prompt
            and leaves at least one where there are two or more.

    Returns:
        [N] booleans, true for held-out rows; nothing is held out of a single prompt.

    Source: ours
    """
    distinct = np.unique(prompts)
    count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1) if fraction > 0 and len(distinct) else 0
    return np.isin(prompts, distinct[:count])


def reduce_row(row: Row, *, select: Selection, list_size: int | None, seed: int) -> Row:
    """The row with fewer completions: its best, its worst, and a random choice of the others.

    Args:
        row: with grades.
        select: all, the best and the worst, or the best alone.
        list_size: how many completions stay at most; None for no bound.
        seed: with the row's id it decides the choice, also between tied completions.

    Returns:
        The row with the chosen completions in their own order; the same row where it is small enough.

    Source: ours
    """
    grades = row.grades or ()
    kept = kept_places(grades, row.id, select=select, list_size=list_size, seed=seed)
    if len(kept) == len(grades):
        return row
    return changed(
        row,
        completions=tuple(row.completions[k] for k in kept),
        grades=tuple(grades[k] for k in kept),
        rewards=row.rewards and tuple(row.rewards[k] for k in kept),
        meta=_reduced(row.meta, kept, len(grades)),
        token_weights=row.token_weights and tuple(row.token_weights[k] for k in kept),
        completion_ids=row.completion_ids and tuple(row.completion_ids[k] for k in kept),
    )


def kept_places(
    grades: Sequence[float], name: str | None, *, select: Selection, list_size: int | None, seed: int
) -> list[int]:
    """The places of the completions that `reduce_row` keeps of a list, in their order."""
    size = {"all": list_size, "best_worst": 2, "best": 1}[select]
    if size is None or len(grades) <= size:
        return list(range(len(grades)))
    order = random.Random(f"{seed} {name}").sample(range(len(grades)), len(grades))
    best = max(order, key=grades.__getitem__)
    others = [k for k in order if k != best]
    worst = min(others, key=grades.__getitem__)
    return sorted([best, worst, *(k for k in others if k != worst)][:size])


def with_trained_places(lists: Dataset, *, select: Selection, list_size: int | None, seed: int) -> Dataset:
    """Whole lists with the column `trained`, the completions that training would keep of each; as they are if all."""
    if not len(lists) or (select == "all" and list_size is None):
        return lists
    options: dict[str, Any] = {"select": select, "list_size": list_size, "seed": seed}
    rows = zip(lists["id"][:], lists["grades"][:], strict=True)
    places = [kept_places(grades, name, **options) for name, grades in rows]
    reduces = any(len(own) < len(grades) for own, grades in zip(places, lists["grades"][:], strict=True))
    return lists.add_column("trained", places) if reduces else lists


def _reduced(meta: dict[str, Any], kept: Sequence[int], size: int) -> dict[str, Any]:
    """The other columns; of ratings, which are a number or an object for each completion, the kept ones'."""

    def rates(value: Any) -> bool:
        by_completion = isinstance(value, list) and len(value) == size
        return by_completion and all(isinstance(own, int | float | dict | None) for own in value)

    return {name: [value[k] for k in kept] if rates(value) else value for name, value in meta.items()}


def prompt_digest(prompt: Text, seed: int) -> bytes:
    """16 bytes that stand for a prompt under a seed."""
    return hashlib.sha256(f"{seed} {prompt_key(prompt)}".encode()).digest()[:16]


def prompt_key(prompt: Text) -> str:
    """A prompt as text that two rows share exactly where their prompts are the same."""
    return _KEY.encode(prompt)
