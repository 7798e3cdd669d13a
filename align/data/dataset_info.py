"""Files that a `dataset_info.json` beside them describes, as LLaMA-Factory has it: which column and which role is what.

Source: LLaMA-Factory's data/README.md and parser.py
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.data.files import Record, file_records
from align.data.schema import BadRow, is_messages
from align.errors import UserError
from align.files import is_there

INFO = "dataset_info.json"
"""`datasets` writes a file of that name too, which describes no files."""
PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name")
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
"""What a description calls a part -> our column for it, where that has another name."""
SAME = ("history", "system", "tools", "chosen", "rejected", "kto_tag", "images", "videos", "audios")
ROLES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
"""Tag of a role -> what it is by default, and the role."""
Info = dict[str, Any]


class Described(dict[str, Any]):
    """A row in the words of our formats, which knows what its file calls each column."""

    own: dict[str, str]


def in_its_words(error: BadRow, raw: object) -> BadRow:
    """A refusal of a described row, about the file's column.

    Source: ours
    """
    if not isinstance(raw, Described):
        return error
    name = re.match(r"\w*", error.field or "")[0]  # type: ignore[index]
    field = raw.own.get(name, name) + (error.field or "")[len(name) :]
    return BadRow(field or None, error.problem, error.remedy, raw=error.raw)


def descriptions(folder: Path) -> dict[str, Info]:
    """What a folder's file describes, by name; nothing where there is none.

    Raises:
        UserError: it is no JSON.

    Source: ours
    """
    file = folder / INFO
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); mend or remove it") from None
    entries = found.items() if isinstance(found, dict) else ()
    return {name: own for name, own in entries if isinstance(own, dict) and any(place in own for place in PLACES)}


def described_records(folder: Path, found: dict[str, Info], split: str | None) -> Iterator[Record]:
    """The objects of the one data set that is asked for, in the words of our formats.

    Raises:
        UserError: none is asked for where there are several, or it is not a file of this folder.

    Source: ours
    """
    here = [name for name, own in found.items() if is_there(folder / str(own.get("file_name")))]
    name = split if split is not None else here[0] if len(here) == 1 else None
    if name not in found:
        remedy = f"name one of {', '.join(here or found)} with `split`"
        said = "names none" if split is None else f"is {split!r}"
        raise UserError(f"{folder}: {INFO} describes {len(found)} data sets, and `split` {said}; {remedy}")
    own = found[name]
    place = folder / str(own.get("file_name"))
    if "file_name" not in own or not is_there(place):
        raise UserError(f"{folder}: {INFO} has `{name}` at {_elsewhere(own)}; give `path` the file or the hub's name")
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    for file in files:
        yield from _in_our_words(file_records(file), name, own)


def records_of_file(file: Path, split: str | None) -> Iterator[Record]:
    """The objects of a file, in the words of our formats where its folder describes it.

    Raises:
        UserError: it is described in two ways.

    Source: ours
    """
    found = descriptions(file.parent)
    names = [name for name, own in found.items() if own.get("file_name") == file.name]
    if not names:
        return file_records(file, split=split)
    words = [{key: own for key, own in found[name].items() if key != "ranking"} for name in names]
    if any(own != words[0] for own in words):
        remedy = "give the folder as `path`, and one of them as `split`"
        raise UserError(f"{file}: {INFO} describes it as {', '.join(names)}; {remedy}")
    return _in_our_words(file_records(file, split=split), names[0], words[0])


def _elsewhere(own: Info) -> str:
    return next(f"`{place}: {own[place]}`" for place in PLACES if place in own)


def _in_our_words(records: Iterator[Record], name: str, own: Info) -> Iterator[Record]:
    if not all(isinstance(own.get(key) or {}, dict) for key in ("columns", "tags")):
        raise UserError(f"{INFO}: `columns` or `tags` of `{name}` is no object; give names by what they are called")
    if own.get("num_samples") is not None:
        raise UserError(f"{INFO}: `num_samples` of `{name}` is not read; remove it, and set data.limit")
    for file, number, raw in records:
        yield file, number, _respelled(raw, own) if isinstance(raw, dict) else raw


def _respelled(raw: Info, own: Info) -> Info | BadRow:
    """A row under the names of our columns, its messages with the general roles."""
    named = own.get("columns") or {}
    target = {column: COLUMNS.get(part, part) for part, column in named.items() if part in (*COLUMNS, *SAME)}
    row = Described()
    row.own = {name: column for column, name in target.items() if column in raw}
    for column, value in raw.items():
        name = target.get(column, column)
        if name in row:
            first = next(other for other in raw if target.get(other, other) == name)
            return BadRow(column, f"{INFO} gives it the name that `{first}` has", "rename or remove one of the two")
        row[name] = value
    if tags := own.get("tags"):
        row.update({name: _retagged(value, tags) for name, value in row.items()})
    return row


def _retagged(value: Any, tags: dict[str, Any]) -> Any:
    """Messages with `role` and `content`, where they have the keys that the tags name; anything else as it is."""
    if isinstance(value, dict):
        (message,) = _retagged([value], tags)
        return message
    key, content = tags.get("role_tag") or "from", tags.get("content_tag") or "value"
    if not is_messages(value) or not all(key in entry for entry in value):
        return value
    roles = {tags.get(tag) or usual: role for tag, (usual, role) in ROLES.items()}
    kept = [{name: own for name, own in entry.items() if name not in (key, content)} for entry in value]
    return [
        {
            "role": roles.get(str(entry[key]), entry[key]),
            **({"content": entry[content]} if content in entry else {}),
            **others,
        }
        for entry, others in zip(value, kept, strict=True)
    ]
