"""What a run is given, as digests: its lists, its base model, functions of the user's own. A second call must be given
the same."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import pyarrow
from datasets import Dataset

from align.data.schema import Row
from align.errors import UserError
from align.files import read_object
from align.model.identity import base_identity
from align.model.load import model_folder
from align.own_code import GIVEN, file_digest, is_of_a_file
from align.recipe import Recipe
from align.runs.run_directory import RunDirectory

log = logging.getLogger("align")

NAMES = ("id", "source", "row")
"""Columns that say where a list comes from, not what it is."""
SHOWN = 3
"""Files named in a message."""

Part = dict[str, list[Any]]
"""`files`, and for every list in its order `digests` and `of`, its file's place among `files`."""


def record_lists(lists: Dataset) -> Part:
    """The digests of tokenised lists: token ids, grades, weights and all else that is in them.

    Source: ours
    """
    own = lists.select_columns([name for name in sorted(lists.column_names) if name not in NAMES])
    batches = own.with_format("arrow").iter(1000) if len(lists) else ()
    return _part(lists["source"][:], [_digest(row) for batch in batches for row in _rows(batch)])


def record_rows(rows: Sequence[Row]) -> Part:
    """The digests of rows that are no token ids yet: prompts to complete, or lists that are held out."""
    fields = ("prompt", "completions", "grades", "rewards", "weight", "meta")
    values = [[getattr(row, name) for name in fields] for row in rows]
    values = [own + [row.loss_weight] * (row.loss_weight != 1) for own, row in zip(values, rows, strict=True)]
    texts = [json.dumps(own, sort_keys=True, default=str) for own in values]
    return _part([row.source for row in rows], [_digest(text.encode()) for text in texts])


def hold_to_record(
    run: RunDirectory,
    recipe: Recipe,
    parts: dict[str, Part],
    *,
    main: bool,
    functions: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write down what a new run is given, or make sure that one with work done is given the same again.

    Args:
        parts: `train` and `heldout`.
        main: whether this process writes.
        functions: digests of code that was given as objects, by what it is.

    Raises:
        UserError: says which file's lists differ and how many, or that the base model or a function's file does.
    """
    policy = recipe.policy
    folder = model_folder(policy.model, policy.revision, trust_remote_code=policy.trust_remote_code)
    functions = {place: file_digest(place) for place in recipe.own_functions} | dict(functions)
    given = {"base": base_identity(policy.model, folder), **parts, **({"functions": functions} if functions else {})}
    damage = run.digests.problem([run.given.name])
    if run.has_work() and run.given.exists() and not damage:
        before = read_object(run.given, "base")
        if before["base"] != given["base"]:
            raise UserError(
                f"{run.path} was trained from another base model than `policy.model` gives; start a new run"
            )
        if changed := sorted(functions.items() ^ before.get("functions", {}).items()):
            place = changed[0][0]
            what = place.rpartition(":")[0] if is_of_a_file(place) else place.removeprefix(f"{GIVEN}:")
            back = "put the old file" if is_of_a_file(place) else "give the old one"
            raise UserError(f"{run.path} was begun with another {what}; {back} back, or give `output` a new folder")
        if found := _difference(before, given):
            raise UserError(
                f"{run.path}: the rows are not those that this run has trained on so far ({found}); put the old data "
                "and the old tokenizer back, or give `output` a new folder"
            )
        return
    if run.has_work():
        reason = damage or f"{run.given} is missing"
        log.warning("%s; it is written again, and only checkpoints of the same rows will be gone on from", reason)
    if main:
        run.before.unlink(missing_ok=True)  # it may be of other rows
        run.write_json(run.given, given, indent=None)


def _part(sources: Sequence[str], digests: list[str]) -> Part:
    files = sorted(set(sources))
    places = {file: place for place, file in enumerate(files)}
    return {"files": files, "of": [places[source] for source in sources], "digests": digests}


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Per file how many lists are no longer there, or elsewhere, and how many are new; empty where all are the same."""
    parts = ("train", "heldout")
    if all(_listed(before[part]) == _listed(now[part]) for part in parts):
        return ""
    old, new = (Counter((part, *one) for part in parts for one in _listed(tree[part])) for tree in (before, now))
    gone, added = (Counter(file for _, file, _ in (a - b).elements()) for a, b in ((old, new), (new, old)))
    files = sorted(gone | added, key=lambda file: -(gone[file] + added[file]))
    had = Counter(file for _, file, _ in old.elements())
    found = [f"{file}: {gone[file]} of {had[file]} lists are gone, {added[file]} are new" for file in files[:SHOWN]]
    if len(files) > SHOWN:
        found.append(f"and {len(files) - SHOWN} more files")
    return "; ".join(found) or "the same lists in another order"


def _listed(part: Part) -> list[tuple[str, str]]:
    return [(part["files"][place], digest) for place, digest in zip(part["of"], part["digests"], strict=True)]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _rows(table: pyarrow.Table) -> Iterator[bytes]:
    columns = [_values(column.combine_chunks()) for column in table.columns]
    return map(b"".join, zip(*columns, strict=True))


def _values(column: Any) -> list[bytes]:
    """Every value's bytes, however deep its lists are nested."""
    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        offsets = column.offsets.to_numpy()
        inner = column.flatten()
        bounds = list(pairwise((offsets - offsets[0]).tolist()))
        if pyarrow.types.is_primitive(inner.type):  # one slice a list, not one object a number
            flat = inner.to_numpy(zero_copy_only=False)
            return [(b - a).to_bytes(4, "little") + flat[a:b].tobytes() for a, b in bounds]
        nested = _values(inner)
        return [(b - a).to_bytes(4, "little") + b"".join(nested[a:b]) for a, b in bounds]
    return [json.dumps(value).encode() for value in column.to_pylist()]
