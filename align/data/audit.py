"""What was read, what is used, and everything between that a user should know; as a table and as JSON."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Group, RenderableType
from rich.table import Table

from align.data.schema import Row, Text, is_messages
from align.data.select import prompt_key

BY_NAME = {
    "completions_left_out": "completion_left_out",
    "prompts_left_out": "prompt_left_out",
    "unread_options": "unread_options",
}
"""Count by name -> the column that lists the names."""
PERCENTILES = (5, 50, 90, 99, 100)


@dataclass
class SourceAudit:
    """One source's rows."""

    path: str
    split: str | None
    part: str
    """train or eval."""
    weight: float
    read: int
    used: int
    refused: dict[str, int]
    """Rows that nothing is learnt from, by reason."""
    columns_not_read: dict[str, int] = field(default_factory=dict)
    """Rows that had a column which nothing uses, by its name; `items[].model` is a key of a list's objects."""
    columns_ignored: dict[str, int] = field(default_factory=dict)
    """Rows that had a column which `data.ignore` names."""


@dataclass
class Audit:
    """Counts over all rows that are used, unless a name says otherwise."""

    sources: list[SourceAudit] = field(default_factory=list)
    train_lists: int = 0
    heldout_lists: int = 0
    list_sizes: dict[int, int] = field(default_factory=dict)
    """Lists by number of completions."""
    duplicate_rows: int = 0
    """Rows whose prompt and completions an earlier row has too."""
    prompts_repeated: int = 0
    """Rows whose completions all began with the prompt and lost it there."""
    prompts_in_completions: int = 0
    """Rows whose completions all begin with the prompt, which is too short to be cut, or a conversation's."""
    duplicate_ids: int = 0
    """Rows with an `id` that an earlier row of the same file has."""
    identical_completions: int = 0
    """Lists in which some completions are the same."""
    ties: int = 0
    """Lists in which some grades are the same."""
    empty_completions: int = 0
    """Completions without text."""
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    """Percentiles, before anything is cut."""
    completion_tokens: dict[str, int] = field(default_factory=dict)
    sequence_tokens: dict[str, int] = field(default_factory=dict)
    """Of a prompt and one completion together."""
    completions: int = 0
    truncated_completions: int = 0
    """Completions cut at max_length; they end without an end token."""
    dropped_completions: int = 0
    """Completions left out because they are longer than max_length, or have no token."""
    prompts_cut: int = 0
    """Prompts that lost their beginning to max_prompt_length."""
    missing_eos: int = 0
    """Completions without an end token, truncated ones among them."""
    eos_added: int = 0
    """Completions whose chat template ends without an end token, so that one was appended."""
    bos_stripped: int = 0
    """Prompts that brought their own start token; it is there once."""
    boundary_rows: int = 0
    """Rows in which the prompt's last tokens merge with a completion, so that they count as its beginning."""
    boundary_tokens: int = 0
    """Those tokens."""
    beyond_positions: int = 0
    """Prompts with a completion that are longer than the model was made for."""
    positions: int | None = None
    """Tokens that it was made for."""
    dropped_rows: int = 0
    """Rows whose chat template ends the prompt differently beside an answer, so that its last tokens are gone."""
    dropped_tokens: int = 0
    """Those tokens."""
    completions_left_out: dict[str, int] = field(default_factory=dict)
    """Completions of which the chat template left text out, by the message's key."""
    prompts_left_out: dict[str, int] = field(default_factory=dict)
    """Prompts likewise, by the message's role and key."""
    repeated_ends: int = 0
    """Completions that brought an end token which is written behind them anyway; it is there once."""
    repeated_heads: int = 0
    """Completions that began with what the prompt ends with (a start token, the assistant's mark); it is there once."""
    prompt_ends: int = 0
    """Messages of prompts that brought the end-of-turn token which the chat template writes; it is there once."""
    white_behind_end: int = 0
    """Completions behind whose end token the chat template writes white space, which TRL trains on and we leave out."""
    unread_options: dict[str, int] = field(default_factory=dict)
    """Rows with an entry of `chat_template_kwargs` that nothing in the chat template reads, by its name."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Training lists left out after tokenisation, by reason; the other counts of lists and tokens still have them."""
    down_weighted: int = 0
    """Training lists taken less often for their CHES."""

    @property
    def read(self) -> int:
        """Rows of all sources."""
        return sum(source.read for source in self.sources)

    @property
    def used(self) -> int:
        """Lists that are trained or evaluated on."""
        return self.train_lists + self.heldout_lists

    @property
    def refused(self) -> dict[str, int]:
        """Rows that nothing is learnt from, by reason, over all sources; CHES among the reasons."""
        total: Counter[str] = Counter(self.left_out)
        for source in self.sources:
            total.update(source.refused)
        return dict(total)

    @property
    def truncated_share(self) -> float:
        """Share of the completions that were cut; 0 where there are none."""
        return self.truncated_completions / self.completions if self.completions else 0.0

    def mark_read(self, columns: Iterable[str]) -> None:
        """Columns that are read after all, by what learns more from a row than its order."""
        for source in self.sources:
            for name in columns:
                source.columns_not_read.pop(name, None)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        totals = {"read": self.read, "used": self.used, "refused": self.refused}
        sizes = {str(size): count for size, count in self.list_sizes.items()}
        return {**totals, **asdict(self), "list_sizes": sizes, "truncated_share": self.truncated_share}


def audit_rows(audit: Audit, rows: Sequence[Row]) -> None:
    """Add what the rows themselves show: duplicates, ties, empty completions."""
    seen: set[str] = set()
    audit.prompts_repeated = sum(row.repeated == "cut" for row in rows)
    audit.prompts_in_completions = sum(row.repeated == "kept" for row in rows)
    audit.duplicate_ids = len(rows) - len({(row.source, row.id) for row in rows})
    for row in rows:
        texts = [prompt_key(completion) for completion in row.completions]
        key = "\n".join([prompt_key(row.prompt), json.dumps(row.template_options, sort_keys=True), *sorted(texts)])
        audit.duplicate_rows += key in seen
        seen.add(key)
        audit.identical_completions += len(set(texts)) < len(texts)
        audit.ties += len(set(row.grades or ())) < len(row.grades or ())
        audit.empty_completions += sum(_is_empty(completion) for completion in row.completions)


def audit_tokens(audit: Audit, parts: Sequence[Dataset]) -> None:
    """Add what tokenisation counted for the lists that are used."""
    prompts: list[int] = []
    completions: list[int] = []
    sequences: list[int] = []
    sizes: Counter[int] = Counter()
    for part in parts:
        prompts += part["prompt_tokens"][:]
        completions += [length for lengths in part["completion_tokens"][:] for length in lengths]
        lists = zip(part["prompt_tokens"][:], part["completion_tokens"][:], strict=True)
        sequences += [prompt + length for prompt, lengths in lists for length in lengths]
        sizes.update(len(grades) for grades in part["grades"][:])
        audit.truncated_completions += sum(part["truncated"][:])
        audit.dropped_completions += sum(part["dropped"][:])
        audit.prompts_cut += sum(part["prompt_cut"][:])
        audit.missing_eos += sum(part["missing_eos"][:])
        audit.eos_added += sum(part["eos_added"][:])
        audit.bos_stripped += sum(part["bos_stripped"][:])
        audit.boundary_rows += sum(moved > 0 for moved in part["moved_tokens"][:])
        audit.boundary_tokens += sum(part["moved_tokens"][:])
        audit.dropped_rows += sum(dropped > 0 for dropped in part["dropped_tokens"][:])
        audit.dropped_tokens += sum(part["dropped_tokens"][:])
        for name in ("repeated_ends", "repeated_heads", "prompt_ends", "white_behind_end"):
            setattr(audit, name, getattr(audit, name) + sum(part[name][:]))
        for name, column in BY_NAME.items():
            counted = Counter(entry for entries in part[column][:] for entry in entries)
            setattr(audit, name, dict(Counter(getattr(audit, name)) + counted))
    audit.list_sizes = dict(sorted(sizes.items()))
    audit.completions = sum(size * count for size, count in sizes.items())
    audit.prompt_tokens, audit.completion_tokens = percentiles(prompts), percentiles(completions)
    audit.sequence_tokens = percentiles(sequences)


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """The lengths' 5th, 50th, 90th and 99th percentile and their maximum; empty for no lengths."""
    if not len(lengths):
        return {}
    values = np.percentile(np.asarray(lengths), PERCENTILES, method="nearest")
    return {("max" if p == 100 else f"p{p}"): int(value) for p, value in zip(PERCENTILES, values, strict=True)}


def in_one_line(audit: Audit) -> str:
    """The audit's counts for a log; those of zero are left out."""
    counts = {**audit.refused, **_facts(audit), "completions truncated": audit.truncated_completions}
    used = f"{audit.used} lists used ({audit.train_lists} to train on, {audit.heldout_lists} held out)"
    found = [f"{count} {name}" for name, count in counts.items() if count]
    columns = [f"columns {what}: {names}" for what, names in _columns(audit).items()]
    return "; ".join([f"data: {audit.read} rows read, {used}", *found, *columns])


def render(audit: Audit) -> RenderableType:
    """The audit as tables for the terminal; counts of zero are left out."""
    sources = Table("source", "part", "weight", "read", "used", "not used, by reason", title="data")
    for source in audit.sources:
        name = source.path + (f" [{source.split}]" if source.split else "")
        reasons = "\n".join(f"{count} {reason}" for reason, count in source.refused.items())
        sources.add_row(name, source.part, f"{source.weight:g}", str(source.read), str(source.used), reasons)
    facts = Table(show_header=False, title="lists")
    facts.add_row("training / held-out lists", f"{audit.train_lists} / {audit.heldout_lists}")
    facts.add_row("lists by size", ", ".join(f"{size}: {count}" for size, count in audit.list_sizes.items()))
    for name, lengths in (("prompt", audit.prompt_tokens), ("completion", audit.completion_tokens)):
        facts.add_row(f"{name} tokens", ", ".join(f"{key} {value}" for key, value in lengths.items()))
    for name, count in _facts(audit).items():
        if count:
            facts.add_row(name, str(count))
    for what, names in _columns(audit).items():
        facts.add_row(f"columns {what}", names)
    if audit.truncated_completions:
        share = f"{audit.truncated_completions} of {audit.completions} ({audit.truncated_share:.1%})"
        facts.add_row("completions truncated", share)
    return Group(sources, facts)


def _columns(audit: Audit) -> dict[str, str]:
    """The columns that are not used, each with its number of rows, by why they are not."""
    texts = {}
    for what, key in (("not read", "columns_not_read"), ("ignored by request", "columns_ignored")):
        counts: Counter[str] = Counter()
        for source in audit.sources:
            counts.update(getattr(source, key))
        if counts:
            texts[what] = ", ".join(f"{name} ({count} rows)" for name, count in counts.items())
    return texts


def _facts(audit: Audit) -> dict[str, int]:
    return {
        f"completions that end beyond the model's {audit.positions} positions": audit.beyond_positions,
        "duplicate rows": audit.duplicate_rows,
        "rows with an earlier row's id": audit.duplicate_ids,
        "rows whose answers repeated the prompt; cut there": audit.prompts_repeated,
        "rows whose answers all begin with the prompt; left so": audit.prompts_in_completions,
        "lists with identical completions": audit.identical_completions,
        "lists with tied grades": audit.ties,
        "empty completions": audit.empty_completions,
        "completions left out (too long or empty)": audit.dropped_completions,
        "prompts cut at their beginning": audit.prompts_cut,
        "completions without an end token": audit.missing_eos,
        "end tokens added to the chat template's": audit.eos_added,
        "prompts with a start token of their own": audit.bos_stripped,
        "rows with prompt tokens moved to the completions": audit.boundary_rows,
        "prompt tokens moved": audit.boundary_tokens,
        "rows whose last prompt tokens the chat template drops beside an answer": audit.dropped_rows,
        "prompt tokens dropped": audit.dropped_tokens,
        **{
            f"completions of which the chat template left text out ({name})": count
            for name, count in audit.completions_left_out.items()
        },
        **{
            f"prompts of which the chat template left text out ({name})": count
            for name, count in audit.prompts_left_out.items()
        },
        "completions with an end token of their own, there once": audit.repeated_ends,
        "completions that began as their prompt ends, there once": audit.repeated_heads,
        "prompt messages with an end-of-turn token of their own, there once": audit.prompt_ends,
        "completions without the white space behind their end token, which TRL trains on": audit.white_behind_end,
        **{
            f"rows whose chat_template_kwargs.{name} no chat template reads": count
            for name, count in audit.unread_options.items()
        },
    }


def _is_empty(completion: Text) -> bool:
    return not (completion[0]["content"] if is_messages(completion) else completion)  # type: ignore[index, call-overload]
