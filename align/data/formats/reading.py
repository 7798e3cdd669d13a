"""Any row: its format reads the prompt and the completions, and every other column is accounted for."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

from align.data.columns import Columns, check_unread, how_to_ignore, texts_in, without
from align.data.formats.base import FORMAT, SYSTEMS, Format, candidates
from align.data.parts import PROMPTS, prompt_name
from align.data.prompt import check_answers, with_system, without_repetition
from align.data.row_numbers import take_numbers
from align.data.schema import (
    ATTRIBUTES,
    MEDIA_COLUMNS,
    TEMPLATE_OPTIONS,
    BadRow,
    Row,
    changed,
    check_characters,
    make_row,
    template_options,
    weights_of_tokens,
)
from align.data.splitting import with_settled_turns
from align.data.tools import TOOLS, check_tools, read_tools

Names = dict[str, str | tuple[str, ...]]
"""What a file calls a row's prompt, completions, grades or rewards; {} stands for the place in the list."""


def read_row(raw: object, source: str, number: int, *, ignore: Sequence[str] = (), prompt_alone: bool = False) -> Row:
    """A row of any known format, checked; every column is read, ignored by request, or among the row's `unread`.

    Args:
        raw: the object as the file holds it; null entries count as absent.
        source: the file it comes from.
        number: its place there, from 1.
        ignore: columns to leave out, as `data.ignore` names them.
        prompt_alone: whether the completions do not count; then what looks like one may stay unread.

    Returns:
        The row; columns that the format does not use are its `meta`.

    Raises:
        BadRow: malformed, of no known format, or with a column that looks like a part of the preference and that the
            format does not use.
        UnusableRow: well-formed, but nothing can be learnt from it.
    """
    if not isinstance(raw, dict):
        raise BadRow(None, f"{type(raw).__name__}, not an object", "give one JSON object with named fields per row")
    check_characters(raw)
    columns = {name: value for name, value in raw.items() if value is not None}
    columns = without(columns, ignore) if ignore else columns
    _refuse_media(columns)
    identity = columns.pop("id", None)
    meta = columns.pop("meta", {})
    if not isinstance(meta, dict):
        raise BadRow("meta", "not an object", "give an object of named values")
    weights = columns.pop("token_weights", None)
    options = template_options(columns.pop(TEMPLATE_OPTIONS, {}))
    numbers: dict[str, Any] = take_numbers(columns, margin=not prompt_alone)
    offered: object = next((columns.pop(name) for name in TOOLS if name in columns), [])
    parts, names = _read_parts(columns)
    tools = read_tools(parts.pop("tools", offered), TOOLS[0])
    unread = {**columns, **parts.pop("unread", {})}
    guessed, kept, asked = parts.pop("guessed", False), parts.pop("kept"), parts.pop("asked", None)
    if guessed:
        _refuse_null_prompt(without(raw, ignore))
    try:
        row = make_row(id=identity, meta={**unread, **kept, **meta}, source=source, number=number, **parts)
        if options or tools or numbers:
            row = changed(row, template_options=options, tools=tools, **numbers)
        check_tools(tools, row.prompt)
        if weights is not None:
            row = changed(row, token_weights=weights_of_tokens(weights, row.completion_ids or row.completions))
        row = _settled(row, asked or row.prompt, prompt_alone)
    except BadRow as error:
        raise BadRow(_own_name(error.field or "", names), error.problem, error.remedy) from None
    if not unread:
        return row
    texts = texts_in([row.prompt, row.completions])
    check_unread(
        _but_texts_of_ids(unread, raw),
        texts,
        ordered=row.grades is not None or row.rewards is not None,
        prompt_is_guessed=guessed,
        prompt_alone=prompt_alone,
    )
    made = {ATTRIBUTES} - raw.keys()  # by the format
    return changed(row, unread=tuple(name for name in unread if name not in made))


def _refuse_media(columns: Columns) -> None:
    if columns.keys().isdisjoint(MEDIA_COLUMNS):
        return
    for name in MEDIA_COLUMNS:
        if columns.get(name):
            raise BadRow(name, "images, audio and video are not supported", "remove the column")


def _read_parts(columns: Columns) -> tuple[Columns, Names]:
    """What the format's reader makes of the columns, with a system text, and how the file names these parts."""
    system = next((name for name in SYSTEMS if isinstance(columns.get(name), str)), None)
    instructions = columns.pop(system) if system else ""
    format = find_format(columns)
    prompt = prompt_name(columns) or ("prompt_ids" if "prompt_ids" in columns else "prompt")
    parts = format.read(columns)
    parts["kept"] = {name: columns.pop(name) for name in format.keeps if name in columns} | parts.get("kept", {})
    names = {"prompt": f"{prompt}[{{}}]", **parts.pop("names")}
    if instructions.strip():
        parts["asked"] = parts["prompt"]
        parts["prompt"] = with_system(parts["prompt"], parts["completions"], instructions)
    return parts, names


def _refuse_null_prompt(raw: Columns) -> None:
    """Refuse a row without the prompt that others of its file have, which its answers' beginning would stand for."""
    null = next((name for name in PROMPTS if raw.get(name, "") is None), None)
    if null is not None:
        raise BadRow(null, "missing (null)", f"give `{null}`, remove the row, or {how_to_ignore(null)}")


def _settled(row: Row, asked: object, prompt_alone: bool) -> Row:
    """The row whose answers do not repeat the prompt."""
    if row.completion_ids is not None:
        return row
    row = without_repetition(with_settled_turns(row), asked)
    if not prompt_alone:
        check_answers(row)
    return row


def _but_texts_of_ids(unread: Columns, raw: Columns) -> Columns:
    """The columns without the texts of token ids that were read: `chosen` beside `chosen_ids`."""
    return {name: value for name, value in unread.items() if f"{name}_ids" not in raw and f"{name[:-1]}_ids" not in raw}


def read_prompt(raw: object, source: str, number: int, *, ignore: Sequence[str] = ()) -> Row:
    """A row of which the prompt alone counts, for sampling; it may be of any known format, or hold nothing else.

    Returns:
        The row without completions, grades and rewards.

    Raises:
        BadRow: no prompt, or malformed.
        UnusableRow: its format has the prompt at the beginning of two texts, and they differ.
    """
    if isinstance(raw, dict):
        columns = {name: value for name, value in raw.items() if value is not None}
        if "prompt_ids" in columns and not columns.keys() & {"completion_ids", "completions_ids", "chosen_ids"}:
            raw = {**raw, "completion_ids": [0]}
        elif (format := _detected(columns)) is None or not format.holds_answers(columns):
            raw = {**raw, "completions": [""]}
    row = read_row(raw, source, number, ignore=ignore, prompt_alone=True)
    return changed(row, completions=(), grades=None, rewards=None, prompt_ids=None, completion_ids=None)


def find_format(columns: Columns) -> type[Format]:
    """The first format that a row is of, in their order.

    Raises:
        BadRow: none.
    """
    if (format := _detected(columns)) is not None:
        return format
    found = ", ".join(columns) or "none"
    if any(name in columns for name in PROMPTS):
        remedy = f"give `completions`, or `chosen` and `rejected`{_how_to_map(columns)}"
        raise BadRow("completions", f"missing (columns: {found})", remedy)
    known = "; ".join(format.shape for format in FORMAT.classes.values() if not format.published)
    raise BadRow(None, f"unknown format (columns: {found})", f"known formats: {known}{_how_to_map(columns)}")


def _how_to_map(columns: Columns) -> str:
    """What a user types to say what their columns are; nothing unless there are just as many texts as are looked for.

    Which of two is the better one is a guess, so it is shown and not done.
    """
    texts = [name for name, value in columns.items() if name not in PROMPTS and isinstance(value, str | list)]
    wanted = [*([] if any(name in columns for name in PROMPTS) else ["prompt"]), "chosen", "rejected"]
    if len(texts) != len(wanted):
        return ""
    pairs = list(zip(wanted, texts, strict=True))
    mapping = ", ".join(f"{name}: {place}" for name, place in pairs)
    options = shlex.join(part for name, place in pairs for part in ("--column", f"{name}={place}"))
    return f", or say which is which with the source's `columns: {{{mapping}}}` (without a recipe {options})"


def _detected(columns: Columns) -> type[Format] | None:
    formats = candidates(tuple(columns), tuple(FORMAT.classes.values()))
    return next((format for format in formats if format.detect(columns)), None)


def _own_name(field: str, names: Names) -> str:
    """A row's field as the file calls it: completions[1] is `rejected` in one file, `items[1].text` in another."""
    field, index, rest = re.fullmatch(r"(\w*)(?:\[(\d+)\])?(.*)", field).groups()  # type: ignore[union-attr]
    own = names.get(field, field + "[{}]")
    if index is None:
        return (own if isinstance(own, str) else "/".join(own)).split("[{}]")[0] + rest
    return (own.format(index) if isinstance(own, str) else own[int(index)]) + rest
