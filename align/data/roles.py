"""What the tokens of a list are to training: read as its prompt or inside a completion, or learnt; counted in words."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from datasets import Dataset

from align.data.schema import Row, is_messages
from align.data.turns import Learn
from align.data.windows import completion_tokens, in_rows, lengths, windows

Weights = list[float | None]
"""How much each token of a completion counts; None for one that is read only."""

Counts = dict[str, dict[str, int]]
"""Tokens that are `learnt` or `read`, by whose they are."""

FIRST, LATER = "of the assistant's first turn in a completion", "of its later turns"
PROMPT, SCORED = "of prompts", "of completions"
MARKS = "of the chat template"
"""Between two turns of the assistant's."""
UNKNOWN = "of other context"
"""Where the messages do not tell, as several turns run into each other."""


def weights_of(example: Mapping[str, Any]) -> list[Weights]:
    """Of each completion of a tokenised list how much each of its tokens counts."""
    completions, places, weights = (example.get(name) for name in ("completion_ids", "learn_at", "token_weights"))
    found: list[Weights] = []
    for k, ids in enumerate(completions or ()):
        at = range(len(ids)) if places is None else places[k]
        known = dict(zip(at, [1.0] * len(at) if weights is None else weights[k], strict=True))
        found.append([known.get(place) for place in range(len(ids))])
    return found


def count_roles(part: Dataset, rows: Sequence[Row], *, learn: Learn | None) -> Counts:
    """Tokens of lists by what training does with them, `learnt` or `read`, and by whose they are.

    Args:
        part: tokenised lists, as they are trained on, with their counts.
        rows: what they were made of, in their order.
        learn: which messages of a completion are learnt; None where completions are only scored.
    """
    total = sum(completion_tokens(part).tolist())
    prompts = sum(int(lengths(window["prompt_ids"]).sum()) for window in windows(part, "prompt_ids"))
    counts: Counts = {"learnt": {}, "read": {PROMPT: prompts}}
    if learn is None or "learn_at" not in part.column_names:
        _add(counts, *(("read", SCORED) if learn is None else ("learnt", FIRST)), total)
        return counts
    every = iter(rows)
    for window in windows(part, "completion_ids", "learn_at", "kept", "completion_tokens"):
        for completions, places, kept, uncut in in_rows(window):
            row = next(every)
            for k, ids, at in zip(kept, completions, places, strict=True):
                gaps = _gaps(row.completions[k], learn)
                for use, whose, tokens in _stretches(len(ids), at, gaps, cut=len(ids) < uncut[k]):
                    _add(counts, use, whose, tokens)
    return counts


def added(one: Counts, other: Counts) -> Counts:
    """Both counts in one."""
    return {use: dict(Counter(one.get(use, {})) + Counter(other[use])) for use in other}


def in_words(counts: Counts) -> dict[str, str]:
    """A line for what is learnt and one for what is read: how many tokens, and whose."""
    said = {}
    for use, name in (("learnt", "tokens learnt"), ("read", "tokens read only")):
        own = {whose: count for whose, count in counts.get(use, {}).items() if count}
        if own:
            total = f"{sum(own.values())}: " if len(own) > 1 else ""
            said[name] = total + "; ".join(f"{count} {whose}" for whose, count in own.items())
    return said


def _add(counts: Counts, use: str, whose: str, tokens: int) -> None:
    counts[use][whose] = counts[use].get(whose, 0) + tokens


def _stretches(size: int, places: Sequence[int], gaps: Sequence[str], *, cut: bool) -> Iterator[tuple[str, str, int]]:
    """A completion's stretches of tokens that are learnt or read together: which, whose, and how many."""
    learnt = set(places)
    runs = [(use, len(list(own))) for use, own in groupby(range(size), learnt.__contains__)]
    count = sum(use for use, _ in runs)
    known = count + 1 == len(gaps) or (cut and count < len(gaps))
    before = 0
    for use, tokens in runs:
        if use:
            yield "learnt", LATER if before else FIRST, tokens
            before += 1
        else:
            yield "read", gaps[before] if known else UNKNOWN, tokens


def _gaps(completion: Any, learn: Learn) -> list[str]:
    """Whose messages stand before, between and behind a completion's learnt ones."""
    if not is_messages(completion):
        return []
    answers = [place for place, own in enumerate(completion) if own["role"] == "assistant"]
    learnt = answers[-1:] if learn == "last" else [place for place in answers if completion[place].get("weight", 1)]
    gaps: list[dict[str, None]] = [{}]
    for place, message in enumerate(completion):
        if place in learnt:
            gaps.append({})
        else:
            gaps[-1][message["role"]] = None
    return [f"of {' and '.join(roles)} messages" if roles else MARKS for roles in gaps]
