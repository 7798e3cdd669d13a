"""What was read, what is used, and everything between that a user should know; as a table and as JSON."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from rich.console import Group, RenderableType

from align.data.roles import Counts, in_words
from align.data.schema import LEFT_OUT, Row, Text, is_messages
from align.data.select import prompt_key
from align.data.windows import lengths, windows
from align.lint import Finding
from align.progress import counted
from align.tables import Table

_JSON = json.JSONEncoder(sort_keys=True)
BY_NAME = {
    "completions_left_out": "completion_left_out",
    "prompts_left_out": "prompt_left_out",
    "unread_options": "unread_options",
}
"""Count by name -> the column that lists the names."""
SUMS = {
    "truncated": "truncated_completions",
    "dropped": "dropped_completions",
    "prompt_cut": "prompts_cut",
    "moved_tokens": "boundary_tokens",
} | {
    name: name
    for name in ("missing_eos", "eos_added", "bos_stripped", "dropped_tokens", "repeated_ends", "repeated_heads")
    + ("prompt_ends", "white_behind_end", "marks_differ")
}
"""Column of counts -> the count that is their sum."""
THINGS = ("row", "list", "answer", "completion", "message", "prompt", "token")
"""What is counted."""
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
    joined: int = 0
    """Rows of the file that were joined with the ones before them, whose prompt they share, into lists."""


@dataclass
class Audit:
    """Counts over all rows that are used, unless a name says otherwise."""

    sources: list[SourceAudit] = field(default_factory=list)
    train_lists: int = 0
    heldout_lists: int = 0
    list_sizes: dict[int, int] = field(default_factory=dict)
    """Lists by number of completions."""
    plain_rows: int = 0
    """Rows of text, which no chat template writes, where others are conversations."""
    continued: int = 0
    """Rows whose completions go on in the assistant's message that their prompt ends with."""
    rewards_against_grades: int = 0
    """Lists of which a completion has the higher grade and another the higher reward."""
    answers_left_out: int = 0
    """Answers of trees that were deleted, or have no rank beside one that has."""
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
    weighted: int = 0
    """Rows that count more or less often than once."""
    margins: int = 0
    """Rows that say how far apart their completions should score."""
    ties: int = 0
    """Lists in which some grades are the same."""
    empty_completions: int = 0
    """Completions without text."""
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    """Percentiles, before anything is cut."""
    completion_tokens: dict[str, int] = field(default_factory=dict)
    sequence_tokens: dict[str, int] = field(default_factory=dict)
    """Of a prompt and one completion together."""
    tokens_by_role: Counts = field(default_factory=dict)
    """Tokens of the lists as they are trained on: `learnt` or `read`, by whose they are."""
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
    marks_differ: int = 0
    """Completions of which the chat template's `{% generation %}` marks name other text than generation would write."""
    unread_options: dict[str, int] = field(default_factory=dict)
    """Rows with an entry of `chat_template_kwargs` that nothing in the chat template reads, by its name."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Training lists left out after tokenisation, by reason; the other counts of lists and tokens still have them."""
    lint: list[Finding] = field(default_factory=list)
    """What the checks of `align.lint` say."""
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

    @classmethod
    def of(cls, kept: dict[str, Any]) -> "Audit":
        """The audit whose fields, as `asdict` gives them, JSON has kept."""
        sources = [SourceAudit(**own) for own in kept["sources"]]
        sizes = {int(size): count for size, count in kept["list_sizes"].items()}
        return cls(**kept | {"sources": sources, "list_sizes": sizes})

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        totals = {"read": self.read, "used": self.used, "refused": self.refused}
        sizes = {str(size): count for size, count in self.list_sizes.items()}
        return {**totals, **asdict(self), "list_sizes": sizes, "truncated_share": self.truncated_share}


def audit_rows(audit: Audit, rows: Iterable[Row]) -> None:
    """Add what the rows themselves show: duplicates, ties, empty completions. Of each only digests stay in memory."""
    contents, ids = bytearray(), bytearray()
    talks = False
    for row in rows:
        texts = [prompt_key(completion) for completion in row.completions]
        key = "\n".join([prompt_key(row.prompt), _JSON.encode(row.template_arguments), *sorted(texts)])
        contents += _digest(key)
        ids += _digest(f"{_JSON.encode(row.source)}, {_JSON.encode(row.id)}")
        audit.plain_rows += isinstance(row.prompt, str)
        talks = talks or is_messages(row.prompt)
        audit.prompts_repeated += row.repeated == "cut"
        audit.prompts_in_completions += row.repeated == "kept"
        audit.identical_completions += len(set(texts)) < len(texts)
        audit.weighted += row.loss_weight != 1
        audit.margins += bool(row.margin)
        audit.continued += _goes_on(row)
        audit.answers_left_out += row.meta.get(LEFT_OUT, 0) if row.gathered else 0
        audit.rewards_against_grades += _disagree(row.grades or (), row.rewards or ())
        audit.ties += len(set(row.grades or ())) < len(row.grades or ())
        audit.empty_completions += sum(_is_empty(completion) for completion in row.completions)
    audit.plain_rows = audit.plain_rows if talks else 0
    audit.duplicate_rows, audit.duplicate_ids = _again(contents), _again(ids)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _again(digests: bytearray) -> int:
    """How many of these digests of 16 bytes stand there a second time, or more often."""
    every = np.frombuffer(bytes(digests), dtype="S16")
    return len(every) - len(np.unique(every))


def audit_tokens(audit: Audit, parts: Sequence[Dataset]) -> None:
    """Add what tokenisation counted for the lists that are used."""
    prompts, completions, sequences = ([np.zeros(0, np.int64)] for _ in range(3))
    sizes: Counter[int] = Counter()
    names: dict[str, Counter[str]] = {name: Counter() for name in BY_NAME}
    columns = ("prompt_tokens", "completion_tokens", "grades", *SUMS, *BY_NAME.values())
    for window in chain.from_iterable(windows(part, *columns) for part in parts):
        prompt = window["prompt_tokens"].to_numpy().astype(np.int64)
        completion = pc.list_flatten(window["completion_tokens"]).to_numpy().astype(np.int64)
        prompts.append(prompt)
        completions.append(completion)
        sequences.append(np.repeat(prompt, lengths(window["completion_tokens"])) + completion)
        sizes.update(lengths(window["grades"]).tolist())
        for column, name in SUMS.items():
            setattr(audit, name, getattr(audit, name) + (pc.sum(window[column].cast("int64")).as_py() or 0))
        audit.boundary_rows += int((window["moved_tokens"].to_numpy() > 0).sum())
        audit.dropped_rows += int((window["dropped_tokens"].to_numpy() > 0).sum())
        for name, column in BY_NAME.items():
            names[name].update(pc.list_flatten(window[column]).to_pylist())
    for name, counts in names.items():
        setattr(audit, name, dict(Counter(getattr(audit, name)) + counts))
    audit.list_sizes = dict(sorted(sizes.items()))
    audit.completions = sum(size * count for size, count in sizes.items())
    audit.prompt_tokens, audit.completion_tokens, audit.sequence_tokens = (
        percentiles(np.concatenate(own)) for own in (prompts, completions, sequences)
    )


def percentiles(values: Any) -> dict[str, int]:
    """Of lengths the 5th, 50th, 90th and 99th percentile and their maximum; empty for no lengths."""
    if not len(values):
        return {}
    found = np.percentile(np.asarray(values), PERCENTILES, method="nearest")
    return {("max" if p == 100 else f"p{p}"): int(value) for p, value in zip(PERCENTILES, found, strict=True)}


def in_one_line(audit: Audit) -> str:
    """The audit's counts for a log; those of zero are left out."""
    counts = {**_facts(audit), "completions truncated": audit.truncated_completions}
    used = f"{counted(audit.used, 'list')} used ({audit.train_lists} to train on, {audit.heldout_lists} held out)"
    refused = [f"{count} {reason}" for reason, count in audit.refused.items() if count]
    facts = [f"{count} {_one(name) if count == 1 else name}" for name, count in counts.items() if count]
    columns = [f"columns {what}: {names}" for what, names in _columns(audit).items()]
    return "; ".join([f"data: {counted(audit.read, 'row')} read, {used}", *refused, *facts, *columns])


def _one(name: str) -> str:
    """What a fact about several is called where there is one: `row with an end token of its own`."""
    name = re.sub(rf"\b({'|'.join(THINGS)})s\b", r"\1", name, count=1)
    return re.sub(r"\btheir\b", "its", name)


def render(audit: Audit) -> RenderableType:
    """The audit as tables for the terminal; counts of zero are left out."""
    sources = Table("source", "part", "weight", "read", "used", "not used, by reason", title="data")
    for source in audit.sources:
        name = source.path + (f" [{source.split}]" if source.split else "")
        reasons = "\n".join(f"{count} {reason}" for reason, count in source.refused.items())
        sources.add_row(name, source.part, f"{source.weight:g}", str(source.read), str(source.used), reasons)
    facts = Table("", "", show_header=False, title="lists")
    for name, words in facts_of(audit).items():
        facts.add_row(name, words)
    if not audit.lint:
        return Group(sources, facts)
    checks = Table("check", "says", title="lint (!: what `data.stop_on` would stop on)")
    for own in audit.lint:
        checks.add_row(f"{own.check} !" if own.bad else own.check, own.said)
    return Group(sources, facts, checks)


def facts_of(audit: Audit) -> dict[str, str]:
    """What there is to say of the lists, by name; counts of zero are left out."""
    facts = {
        "training / held-out lists": f"{audit.train_lists} / {audit.heldout_lists}",
        "lists by size": ", ".join(f"{size}: {count}" for size, count in audit.list_sizes.items()),
    }
    for name, own in (("prompt", audit.prompt_tokens), ("completion", audit.completion_tokens)):
        facts[f"{name} tokens"] = ", ".join(f"{key} {value}" for key, value in own.items())
    facts |= in_words(audit.tokens_by_role)
    facts |= {name: str(count) for name, count in _facts(audit).items() if count}
    facts |= {f"columns {what}": names for what, names in _columns(audit).items()}
    if audit.truncated_completions:
        share = f"{audit.truncated_completions} of {audit.completions} ({audit.truncated_share:.1%})"
        facts["completions truncated"] = share
    return facts


def _columns(audit: Audit) -> dict[str, str]:
    """The columns that are not used, each with its number of rows, by why they are not."""
    texts = {}
    for what, key in (("not read", "columns_not_read"), ("ignored by request", "columns_ignored")):
        counts: Counter[str] = Counter()
        for source in audit.sources:
            counts.update(getattr(source, key))
        if counts:
            texts[what] = ", ".join(f"{name} ({counted(count, 'row')})" for name, count in counts.items())
    return texts


def _facts(audit: Audit) -> dict[str, int]:
    return {
        f"completions with an end beyond the model's {audit.positions} positions": audit.beyond_positions,
        "rows joined with earlier ones into lists": sum(source.joined for source in audit.sources),
        "rows of text, which no chat template writes, beside conversations": audit.plain_rows,
        "rows whose answers go on in the assistant's message that ends their prompt": audit.continued,
        "lists with rewards that order them unlike their grades, which are learnt": audit.rewards_against_grades,
        "answers of trees left out (deleted, or not ranked)": audit.answers_left_out,
        "duplicate rows": audit.duplicate_rows,
        "rows with an earlier row's id": audit.duplicate_ids,
        "rows whose answers repeated the prompt; cut there": audit.prompts_repeated,
        "rows whose answers all begin with the prompt; left so": audit.prompts_in_completions,
        "lists with identical completions": audit.identical_completions,
        "rows with a weight of their own": audit.weighted,
        "rows with a margin": audit.margins,
        "lists with tied grades": audit.ties,
        "empty completions": audit.empty_completions,
        "completions left out (too long or empty)": audit.dropped_completions,
        "prompts cut at the beginning": audit.prompts_cut,
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
        "completions whose chat template marks ({% generation %}) other text than generation would write; "
        "learnt is what generation would write": audit.marks_differ,
        **{
            f"rows whose chat_template_kwargs.{name} no chat template reads": count
            for name, count in audit.unread_options.items()
        },
    }


def _is_empty(completion: Text) -> bool:
    if not is_messages(completion):
        return not completion
    return not any(message["content"] or message.get("tool_calls") for message in completion)  # type: ignore[index, union-attr]


def _goes_on(row: Row) -> bool:
    if not is_messages(row.prompt) or row.prompt[-1]["role"] != "assistant":  # type: ignore[index]
        return False
    return any(own[0]["role"] == "assistant" if is_messages(own) else True for own in row.completions)  # type: ignore[index]


def _disagree(grades: Sequence[float], rewards: Sequence[float]) -> bool:
    """Whether two completions are one way round by their grades and the other by their rewards; ties do not count."""
    ordered = [grade for _, grade in sorted(zip(rewards, grades, strict=False))]
    return any(after < before for before, after in itertools.pairwise(ordered))
