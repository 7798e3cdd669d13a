"""All the steps from sources to token ids, with their audit: in windows of rows, into files that are kept."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.data.admit import Owners, Wanted, grade_row, read_sources
from align.data.audit import Audit, audit_rows, audit_tokens
from align.data.config import DataSection
from align.data.findings import kept_findings
from align.data.kept import kept_folder
from align.data.linting import check_findings, lint, wanted_checks
from align.data.preparation_key import preparation_key
from align.data.roles import added, count_roles
from align.data.row_numbers import with_row_numbers
from align.data.row_store import RowStore, RowWriter, StoredRows
from align.data.schema import Row
from align.data.select import Selection, hold_out, reduce_row
from align.data.texts import check_options
from align.data.tokenize import COUNTS, Reading, tokenize_rows
from align.data.windows import in_rows, windows
from align.errors import UserError
from align.files import read_object, write_json
from align.progress import stage

__all__ = ["Prepared", "Wanted", "grade_row", "prepare_data"]

PARTS = ("train", "heldout")
USED, AUDIT = "used.npz", "audit.json"
"""Of a preparation: which rows and lists are used, and what was counted; beside the rows and a table for each part."""
SHARED = "prompt is among the evaluation rows"


@dataclass(frozen=True)
class Prepared:
    """What the trainer needs of the data; lists and rows are on disk, and come into memory when they are asked for."""

    train: Dataset
    """Columns id, prompt_ids, completion_ids, grades, weight, source, row; with `contrast` better_ids and worse_ids;
    where rows have them loss_weight and margin, where only some tokens are learnt learn_at, where messages have
    weights token_weights."""
    heldout: Dataset
    """Likewise; whole lists, whatever `select` and `list_size` do to the training lists."""
    audit: Audit
    train_rows: Sequence[Row]
    """The rows of `train`, in its order; a list's `kept` says which of its row's completions it has."""
    heldout_rows: Sequence[Row]
    """Likewise of `heldout`."""


def prepare_data(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    wanted: Wanted = Wanted(),  # noqa: B008, frozen
) -> Prepared:
    """Read, grade, split, reduce and tokenise; count everything. What was prepared before of the same is read again.

    Memory: the texts of a window of rows, and of every row about 275 bytes (measured on lists of eight).

    Args:
        section: a recipe's `data`, all of it but `ches`, which scores of a model are needed for.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own; see `read_chat_template`.

    Returns:
        Both parts as token ids, the audit and the held-out rows; nothing may be held out.

    Raises:
        UserError: a source cannot be read, a row is malformed, or no training row is left.

    Source: ours
    """
    check_options(section.template_options, tokenizer, chat_template)
    given = (section, tokenizer, chat_template, wanted)
    with frozen_garbage():
        folder = kept_folder(lambda: preparation_key(*given), lambda empty: _prepare(empty, *given))
        prepared = _opened(folder, section, wanted)
        _check_ignored(prepared.audit, section.ignore)
        names = wanted_checks(stop_on=section.stop_on, thorough=wanted.every_check)
        look = partial(lint, prepared.train_rows, prepared.heldout_rows, tokenizer)
        prepared.audit.lint = kept_findings(folder, names, look)
    check_findings(prepared.audit.lint, section.stop_on)
    return prepared


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Let the garbage collector look at what is made from here on alone: else it walks over all that torch and
    transformers hold each time that enough rows came and went.

    Source: ours
    """
    own = gc.get_freeze_count() == 0
    if own:
        gc.freeze()
    try:
        yield
    finally:
        if own:
            gc.unfreeze()


def _prepare(
    folder: Path, section: DataSection, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, wanted: Wanted
) -> None:
    """Write a preparation into a folder."""
    audit, writer = Audit(), RowWriter(folder, seed=wanted.seed)
    owners = read_sources(audit, "train", section, wanted, writer)
    count = len(writer)
    eval_owners = read_sources(audit, "eval", section, wanted, writer)
    _check_ignored(audit, section.ignore)
    store = writer.close()
    if section.eval_sources:
        parts = _without_shared_prompts(store, count, owners)
    else:
        held = hold_out(store.prompts, section.eval_fraction)
        parts, eval_owners = (np.flatnonzero(~held), np.flatnonzero(held)), owners
    tokenize = partial(
        tokenize_rows,
        tokenizer=tokenizer,
        reading=_reading(section, chat_template, wanted),
        workers=section.workers,
        token_weights=wanted.token_weights,
    )
    rows = _rows_of(store, parts, section, wanted)
    least = (1 if wanted.imitate else wanted.min_completions, wanted.min_completions)
    lists, used = [], []
    for part, own, who, fewest in zip(PARTS, rows, (owners, eval_owners), least, strict=True):
        tokens = tokenize(own, file=_table(folder, part))
        kept = _usable(own, tokens, who, fewest)
        lists.append(tokens.select(kept))
        used.append(own.chosen(kept))
    with stage("counting what is in the rows"):
        audit_rows(audit, chain(*used))
    lists = [with_row_numbers(own, margins=wanted.margins) for own in lists]
    for own_lists, own in zip(lists, used, strict=True):
        counts = count_roles(own_lists, own, learn=None if wanted.as_scored else section.learn)
        audit.tokens_by_role = added(audit.tokens_by_role, counts)
    _finish(audit, *lists)
    _write(folder, audit, lists, parts, used)


def _rows_of(
    store: RowStore, parts: Sequence[np.ndarray], section: DataSection, wanted: Wanted
) -> tuple[StoredRows, StoredRows]:
    """Training rows, which may lose completions, and held-out rows, which do not."""
    select: Selection = "best" if wanted.imitate else section.select
    reduces = select != "all" or section.list_size is not None
    reduce = partial(reduce_row, select=select, list_size=section.list_size, seed=wanted.seed) if reduces else None
    return StoredRows(store, parts[0], reduce), StoredRows(store, parts[1])


def _table(folder: Path, part: str) -> Path:
    return folder / f"{part}.arrow"


def _write(
    folder: Path, audit: Audit, lists: Sequence[Dataset], parts: Sequence[np.ndarray], used: Sequence[StoredRows]
) -> None:
    arrays: dict[str, Any] = {}
    columns = {}
    for part, own, every, rows in zip(PARTS, lists, parts, used, strict=True):
        arrays |= {f"{part}_rows": rows.places, f"{part}_lists": np.searchsorted(every, rows.places)}
        columns[part] = [name for name in own.column_names if name not in COUNTS]
    np.savez(folder / USED, **arrays)
    write_json(folder / AUDIT, {"audit": asdict(audit), "columns": columns}, indent=None)


def _opened(folder: Path, section: DataSection, wanted: Wanted) -> Prepared:
    """What stands in a preparation's folder."""
    about = read_object(folder / AUDIT, "audit", "columns")
    with np.load(folder / USED) as used:
        tables = {part: Dataset.from_file(str(_table(folder, part))).select(used[f"{part}_lists"]) for part in PARTS}
        rows = _rows_of(RowStore(folder), [used[f"{part}_rows"] for part in PARTS], section, wanted)
    train, heldout = (table.select_columns(about["columns"][part]) for part, table in tables.items())
    return Prepared(train, heldout, Audit.of(about["audit"]), *rows)


def _reading(section: DataSection, chat_template: str | None, wanted: Wanted) -> Reading:
    return Reading(
        chat_template=chat_template,
        max_length=section.max_length,
        max_prompt_length=section.max_prompt_length,
        overlong=section.overlong,
        append_eos=None if wanted.as_scored else section.append_eos is not False,
        contrast=wanted.contrast,
        learn=section.learn,
    )


def _check_ignored(audit: Audit, ignore: Sequence[str]) -> None:
    """Refuse a name to ignore that no row has: a slip there would look like a column that is ignored."""
    for name in ignore:
        if not any(source.columns_ignored.get(name) for source in audit.sources):
            raise UserError(f"data.ignore: no row has a column `{name}`; name one that the rows have")


def _without_shared_prompts(store: RowStore, count: int, owners: Owners) -> tuple[np.ndarray, np.ndarray]:
    """The places of the training rows whose prompt no evaluation row has, and of the evaluation rows."""
    train, heldout = np.arange(count), np.arange(count, len(store))
    shared = np.isin(store.prompts[train], store.prompts[heldout])
    for source in store.sources[train[shared]].tolist():
        _refuse(owners, store.names[source], SHARED)
    return train[~shared], heldout


def _usable(rows: StoredRows, tokens: Dataset, owners: Owners, min_completions: int) -> np.ndarray:
    """The places of the lists of which not too little is left; every row is counted with its source."""
    kept, names = [], ("refused", "identical", "grades", "completion_left_out", "identical_uncut")
    found = chain.from_iterable(map(in_rows, windows(tokens, *names)))
    for position, (reason, identical, grades, left_out, uncut) in enumerate(found):
        if not reason and len(grades) < min_completions:
            reason = f"fewer than {min_completions} completions within max_length"
        if not reason and min_completions > 1 and identical:
            reason = _why_identical(left_out if uncut else [])
        if not reason and min_completions > 1 and len(set(grades)) == 1:
            reason = "all grades tied among the completions within max_length"
        if reason:
            _refuse(owners, rows.source(position), reason)
        else:
            owners[rows.source(position)].used += 1
            kept.append(position)
    return np.array(kept, dtype=np.int64)


def _why_identical(left_out: list[str]) -> str:
    """Completions that differ as texts and not as tokens: which text of them is in no token, if any."""
    if not left_out:
        return "all completions identical within max_length"
    keys = ", ".join(sorted(set(left_out)))
    return (
        f"completions that differ only in text that the chat template leaves out ({keys}; give `policy.chat_template` "
        "one that writes it)"
    )


def _finish(audit: Audit, train: Dataset, heldout: Dataset) -> None:
    audit.train_lists, audit.heldout_lists = len(train), len(heldout)
    audit_tokens(audit, [train, heldout])
    if not len(train):
        sources = [source for source in audit.sources if source.part == "train"]
        refused = [f"{count} {reason}" for source in sources for reason, count in source.refused.items()]
        reasons, read = ", ".join(refused) or "all rows are held out", sum(source.read for source in sources)
        raise UserError(f"data.sources: no training row is left of {read} ({reasons}); mend them or add others")


def _refuse(owners: Owners, source: str, reason: str) -> None:
    tally = owners[source]
    tally.refused[reason] = tally.refused.get(reason, 0) + 1
