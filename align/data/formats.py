"""Readers: one function per row format, and the table that says which one reads a row."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from align.data.columns import Columns, check_unread, how_to_ignore, texts_in, without
from align.data.parts import (
    ITEM_REWARDS,
    PROMPTS,
    as_grades,
    has_prompt,
    list_grades,
    parts_of,
    prompt_name,
    side_rewards,
    single_grade,
    take,
    take_prompt,
)
from align.data.prompt import check_answers, with_system, without_repetition
from align.data.schema import (
    ATTRIBUTES,
    MEDIA_COLUMNS,
    TEMPLATE_OPTIONS,
    BadRow,
    Row,
    UnusableRow,
    check_characters,
    is_messages,
    is_token_ids,
    make_row,
    template_options,
    weights_of_tokens,
)

Names = dict[str, str | tuple[str, ...]]
"""What a file calls a row's prompt, completions, grades or rewards; {} stands for the place in the list."""

SYSTEMS = ("system", "system_prompt", "system_message")
LISTS = ("items", "completions", "responses", "all_generated_responses", "answers")
ITEM_TEXTS = ("text", "completion", "response", "answer", "content")
ITEM_ATTRIBUTES = ("attributes", "scores")
COMPLETIONS = ("completion", "response")
SIDES = ("chosen", "rejected")
SAMPLING_RECORD = ("sampled_logprobs", "raw_logprobs", "entropies", "ended", "policy_version")
"""What `align rollout` writes beside its samples, of how they were drawn; it is kept with the row."""
HH_ASSISTANT = "\n\nAssistant:"


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
    columns = without({name: value for name, value in raw.items() if value is not None}, ignore)
    for name in (*MEDIA_COLUMNS, "tools"):
        if columns.get(name):
            raise BadRow(name, "images, audio, video and tools are not supported", "remove the column")
    identity = columns.pop("id", None)
    meta = columns.pop("meta", {})
    if not isinstance(meta, dict):
        raise BadRow("meta", "not an object", "give an object of named values")
    weights = columns.pop("token_weights", None)
    options = template_options(columns.pop(TEMPLATE_OPTIONS, {}))
    parts, names = _read_parts(columns)
    unread = {**columns, **parts.pop("unread", {})}
    guessed, kept, asked = parts.pop("guessed", False), parts.pop("kept", {}), parts.pop("asked", None)
    if guessed:
        _refuse_null_prompt(without(raw, ignore))
    try:
        row = make_row(id=identity, meta={**unread, **kept, **meta}, source=source, number=number, **parts)
        row = replace(row, template_options=options) if options else row
        if weights is not None:
            row = replace(row, token_weights=weights_of_tokens(weights, row.completion_ids or row.completions))
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
    return replace(row, unread=tuple(unread))


def _read_parts(columns: Columns) -> tuple[Columns, Names]:
    """What the format's reader makes of the columns, with a system text, and how the file names these parts."""
    system = next((name for name in SYSTEMS if isinstance(columns.get(name), str)), None)
    instructions = columns.pop(system) if system else ""
    reader = find_reader(columns)
    prompt = prompt_name(columns) or ("prompt_ids" if "prompt_ids" in columns else "prompt")
    parts = reader(columns)
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
    row = without_repetition(row, asked)
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
        named = {name for name, value in raw.items() if value is not None}
        if "prompt_ids" in named and not named & {"completion_ids", "completions_ids", "chosen_ids"}:
            raw = {**raw, "completion_ids": [0]}
        elif not named & {*LISTS, *SIDES, "completion", "prompt_ids"} and not _ends_with_answer(raw):
            raw = {**raw, "completions": [""]}
    row = read_row(raw, source, number, ignore=ignore, prompt_alone=True)
    return replace(row, completions=(), grades=None, rewards=None, prompt_ids=None, completion_ids=None)


def find_reader(columns: Columns) -> "Reader":
    """The reader of the first format in FORMATS that a row has.

    Raises:
        BadRow: none.
    """
    for detects, reader in FORMATS.values():
        if detects(columns):
            return reader
    found = ", ".join(columns) or "none"
    if any(name in columns for name in PROMPTS):
        raise BadRow("completions", f"missing (columns: {found})", "give `completions`, or `chosen` and `rejected`")
    raise BadRow(None, f"unknown format (columns: {found})", f"known formats: {'; '.join(FORMATS)}")


def read_token_ids(columns: Columns) -> Columns:
    """{prompt_ids, completions_ids | completion_ids | chosen_ids + rejected_ids} with any grades."""
    prompt = columns.pop("prompt_ids")
    if "chosen_ids" in columns:
        completions = [columns.pop("chosen_ids"), take(columns, "rejected_ids")]
        return parts_of(prompt, completions, ("chosen_ids", "rejected_ids"), grades=[1.0, 0.0])
    name = "completions_ids" if "completions_ids" in columns else "completion_ids"
    completions = take(columns, name)
    if is_token_ids(completions):
        return parts_of(prompt, [completions], (name,), **single_grade(columns))
    return parts_of(prompt, completions, f"{name}[{{}}]", **list_grades(columns))


def read_list(columns: Columns) -> Columns:
    """{prompt, completions | responses | ...} with grades, rewards or ranks beside them; the canonical row is one."""
    name = next(name for name in LISTS if name in columns)
    completions = columns.pop(name)
    return parts_of(take_prompt(columns), completions, f"{name}[{{}}]", **list_grades(columns))


def read_sampled(columns: Columns) -> Columns:
    """{prompt, completions, prompt_ids, completion_ids}: a policy's own samples, as `align rollout` writes them."""
    ids = {name: columns.pop(name) for name in ("prompt_ids", "completion_ids")}
    kept = {name: columns.pop(name) for name in SAMPLING_RECORD if name in columns}
    return {**read_list(columns), **ids, "kept": kept}


def read_items(columns: Columns) -> Columns:
    """{prompt, items | completions | answers: objects that hold a text and its grade, score, rating or rank}."""
    name = next(name for name in LISTS if name in columns)
    items = columns.pop(name)
    text = next((key for key in ITEM_TEXTS if key in items[0]), None)
    if text is None:
        raise BadRow(f"{name}[0]", f"no text (keys: {', '.join(items[0])})", f"name it one of {', '.join(ITEM_TEXTS)}")
    grades: Columns = {}
    key = next((key for key in ("grade", *ITEM_REWARDS, "rank") if any(key in item for item in items)), None)
    if key is not None:
        values = [take(item, key, f"{name}[{k}]") for k, item in enumerate(items)]
        grades = as_grades(key, values, f"{name}[{{}}].{key}")
    texts = [take(item, text, f"{name}[{k}]") for k, item in enumerate(items)]
    rated = next((key for key in ITEM_ATTRIBUTES if isinstance(items[0].get(key), dict)), None)
    if rated is not None:
        columns[ATTRIBUTES] = [item.get(rated) for item in items]
    others = {other: 1 for item in items for other, value in item.items() if value is not None}
    unread = {
        f"{name}[].{other}": [item.get(other) for item in items] for other in others if other not in (text, key, rated)
    }
    return {**parts_of(take_prompt(columns), texts, f"{name}[{{}}].{text}", **grades), "unread": unread}


def read_preference(columns: Columns) -> Columns:
    """{prompt, chosen, rejected}: text, one message or whole conversations; `margin` and the like become meta."""
    name = prompt_name(columns) or "prompt"
    prompt = take_prompt(columns)
    chosen, rejected = take(columns, "chosen"), take(columns, "rejected")
    if _is_conversation(chosen) and _is_conversation(rejected):
        parts = _split_conversations(chosen, rejected)
        known = [parts["prompt"], chosen, rejected, *(message.get("content") for message in parts["prompt"])]
        if prompt not in known:
            remedy = f"give the assistant's message alone, or {how_to_ignore(name)}"
            raise BadRow("chosen", f"a conversation without the text of `{name}`", remedy)
        return {**parts, **side_rewards(columns)}
    return parts_of(prompt, [chosen, rejected], SIDES, grades=[1.0, 0.0], **side_rewards(columns))


def read_preference_sets(columns: Columns) -> Columns:
    """{prompt, chosen: [...], rejected: [...]}: several right and several wrong completions (benchmarks)."""
    sides = {name: take(columns, name) for name in SIDES}
    for name, side in sides.items():
        if not isinstance(side, list):
            raise BadRow(name, "one completion beside a list of them", "give lists in both columns")
    right, wrong = sides.values()
    names = tuple(f"{name}[{k}]" for name, side in sides.items() for k in range(len(side)))
    given = {"grades": [1.0] * len(right) + [0.0] * len(wrong), "rewards": columns.pop("rewards", None)}
    return parts_of(take_prompt(columns), [*right, *wrong], names, **given)


def read_implicit_preference(columns: Columns) -> Columns:
    """{chosen, rejected} that both start with the prompt: conversations, or texts."""
    chosen, rejected = take(columns, "chosen"), take(columns, "rejected")
    if is_messages(chosen) and is_messages(rejected):
        return {**_split_conversations(chosen, rejected), **side_rewards(columns)}
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise BadRow("chosen", "chosen and rejected are not both text or both messages", "give them in one form")
    try:
        return {**_split_texts(chosen, rejected), **side_rewards(columns), "guessed": True}
    except UnusableRow:  # perhaps their prompt stands in a column that no reader knows
        check_unread(columns, (chosen, rejected), ordered=True, prompt_is_guessed=True)
        raise


def read_dialogue_text(columns: Columns) -> Columns:
    """{chosen, rejected}: HH-style dialogue text; the prompt ends with the last assistant mark."""
    sides = [take(columns, "chosen"), take(columns, "rejected")]
    if not isinstance(sides[1], str):
        raise BadRow("rejected", "not text", "give dialogue text as in `chosen`")
    cuts = [side.rfind(HH_ASSISTANT) + len(HH_ASSISTANT) for side in sides]
    prompts = [side[:cut] for side, cut in zip(sides, cuts, strict=True)]
    if prompts[0] != prompts[1]:
        raise UnusableRow("prompt mismatch between chosen and rejected")
    return parts_of(prompts[0], [side[cut:] for side, cut in zip(sides, cuts, strict=True)], SIDES, grades=[1.0, 0.0])


def read_completion(columns: Columns) -> Columns:
    """{prompt, completion | response} with a `label` (true is good), a score, ratings by name, or neither."""
    name = next(name for name in COMPLETIONS if name in columns)
    completion = columns.pop(name)
    rated = next((key for key in ITEM_ATTRIBUTES if isinstance(columns.get(key), dict)), None)
    if rated is not None:
        columns[ATTRIBUTES] = [columns.pop(rated)]
    return parts_of(take_prompt(columns), [completion], (name,), **single_grade(columns))


def read_conversation(columns: Columns) -> Columns:
    """{messages} whose last message is the completion, with a `label`, a score, or neither."""
    messages = columns.pop("messages")
    if not is_messages(messages):
        raise BadRow("messages", "not a list of messages", "give a list of objects with `role` and `content`")
    if messages[-1].get("role") != "assistant":
        raise BadRow("messages", "the last message is not the assistant's", "end with the completion to learn from")
    return parts_of(messages[:-1], [messages[-1:]], ("messages",), **single_grade(columns))


Reader = Callable[[Columns], Columns]

FORMATS: dict[str, tuple[Callable[[Columns], bool], Reader]] = {
    "{prompt_ids, completions_ids, grades}": (lambda c: "prompt_ids" in c and not _is_sampled(c), read_token_ids),
    "{prompt, completions, prompt_ids, completion_ids, rewards}": (lambda c: _is_sampled(c), read_sampled),
    "{prompt, items: [{text, score}]}": (lambda c: _has_items(c), read_items),
    "{prompt, completions, grades | rewards | ranks}": (lambda c: any(name in c for name in LISTS), read_list),
    "{prompt, chosen: [...], rejected: [...]}": (lambda c: _is_sets(c), read_preference_sets),
    "{chosen, rejected} of dialogue text": (lambda c: _is_dialogue(c), read_dialogue_text),
    "{chosen, rejected}": (lambda c: _is_pair(c) and not has_prompt(c), read_implicit_preference),
    "{prompt, chosen, rejected}": (lambda c: _is_pair(c), read_preference),
    "{prompt, completion, label}": (lambda c: any(name in c for name in COMPLETIONS), read_completion),
    "{messages, label}": (lambda c: "messages" in c, read_conversation),
}


def _own_name(field: str, names: Names) -> str:
    """A row's field as the file calls it: completions[1] is `rejected` in one file, `items[1].text` in another."""
    field, index, rest = re.fullmatch(r"(\w*)(?:\[(\d+)\])?(.*)", field).groups()  # type: ignore[union-attr]
    own = names.get(field, field + "[{}]")
    if index is None:
        return (own if isinstance(own, str) else "/".join(own)).split("[{}]")[0] + rest
    return (own.format(index) if isinstance(own, str) else own[int(index)]) + rest


def _has_items(columns: Columns) -> bool:
    name = next((name for name in LISTS if name in columns), None)
    return name is not None and is_messages(columns[name]) and "role" not in columns[name][0]


def _is_sampled(columns: Columns) -> bool:
    return "completions" in columns and "prompt_ids" in columns and any(name in columns for name in PROMPTS)


def _ends_with_answer(columns: Columns) -> bool:
    messages = columns.get("messages")
    return is_messages(messages) and messages[-1].get("role") == "assistant"  # type: ignore[index]


def _is_pair(columns: Columns) -> bool:
    return "chosen" in columns or "rejected" in columns


def _is_sets(columns: Columns) -> bool:
    chosen = columns.get("chosen")
    return isinstance(chosen, list) and bool(chosen) and all(isinstance(text, str) for text in chosen)


def _is_dialogue(columns: Columns) -> bool:
    chosen = columns.get("chosen")
    return isinstance(chosen, str) and HH_ASSISTANT in chosen and not has_prompt(columns)


def _is_conversation(value: object) -> bool:
    return is_messages(value) and len(value) > 1  # type: ignore[arg-type]


def _split_conversations(chosen: list[Any], rejected: list[Any]) -> Columns:
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRow("prompt mismatch between chosen and rejected")
    return parts_of(chosen[:-1], [chosen[-1:], rejected[-1:]], SIDES, grades=[1.0, 0.0])


def _split_texts(chosen: str, rejected: str) -> Columns:
    """Cut at the last white space of the common beginning, so that no word or special token is cut in half.

    The cut lies before the end of the shorter text: where one side begins with the whole other, its last word
    belongs to the completion and not to the prompt.
    """
    shorter = min(len(chosen), len(rejected))
    common = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(shorter - 1, 0))
    spaces = [match.start() for match in re.finditer(r"\s+", chosen[: common + 1]) if match.start() > 0]
    if not spaces:
        raise UnusableRow("prompt mismatch between chosen and rejected")
    return parts_of(chosen[: spaces[-1]], [chosen[spaces[-1] :], rejected[spaces[-1] :]], SIDES, grades=[1.0, 0.0])
