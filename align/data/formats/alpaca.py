"""Rows of an instruction with its input, its answer and earlier turns."""

from typing import Any

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.lists import LISTS
from align.data.formats.respelled import as_conversation, read_as_general
from align.data.messages import Message
from align.data.parts import has_prompt, prompt_name, take_prompt
from align.data.schema import BadRow, is_messages
from align.data.strict_json import literal

ANSWERS = (
    "chosen",
    "rejected",
    "chosen_response",
    "completion",
    "response",
    "rejected_response",
    "generations",
    *LISTS,
)


@FORMAT.add
class Alpaca(Format):
    """An instruction with its `input` below it, earlier turns in `history`, and a pair, an `output` with a `kto_tag`,
    or an `output` of the better and the worse answer.

    Source: LLaMA-Factory's data/README.md and converter.py, which joins instruction and input by a line break;
    ms-swift's `query`, `response` and `history`
    """

    name = "alpaca"
    shape = "{instruction, input, history, system, chosen, rejected | output, kto_tag}"
    published = "LLaMA-Factory, Alpaca, ms-swift"
    before = (
        "preference",
        "completion",
        "preference_sets",
        "items",
        "distilabel",
        "distilabel_pair",
        "chosen_response",
    )

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        if columns.keys().isdisjoint(ANSWERS):
            return "output" in columns and has_prompt(columns)
        return _has_input(columns) or (bool(_history(columns)) and has_prompt(columns))

    @staticmethod
    def read(columns: Columns) -> Columns:
        called = prompt_name(columns) or "prompt"
        own = {"prompt": called}
        below = columns.pop("input") if _has_input(columns) else None
        asked = take_prompt(columns)
        columns["prompt"] = asked if below is None else f"{asked}\n{below}"
        if not any(name in columns for name in ANSWERS):
            own |= _take_output(columns)
        if history := _history(columns):
            earlier = _turns(history)
            del columns["history"]
            columns["prompt"] = [*earlier, *as_conversation(columns["prompt"], called)]
        return read_as_general(columns, own)


def _has_input(columns: Columns) -> bool:
    instruction, below = columns.get("instruction"), columns.get("input")
    return isinstance(below, str) and bool(below) and isinstance(instruction, str) and "prompt" not in columns


def _take_output(columns: Columns) -> dict[str, str]:
    """Give the output the names of a completion or of a pair's sides; what the file calls them."""
    output = columns.pop("output")
    if not isinstance(output, list) or is_messages(output):
        columns["completion"] = output
        return {"completion": "output"}
    if len(output) != 2:
        raise BadRow("output", f"a list of {len(output)}", "give the better and the worse answer, or `completions`")
    columns["chosen"], columns["rejected"] = output
    return {"chosen": "output[0]", "rejected": "output[1]"}


def _history(columns: Columns) -> list[Any] | None:
    """Earlier turns of question and answer, or messages; also where they are written as text, as tables have them."""
    value = columns.get("history")
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = literal(value)
        except ValueError:
            return None
    turns = value if isinstance(value, list) else []
    return turns if is_messages(turns) or all(map(_is_turn, turns)) else None


def _is_turn(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _turns(history: Any) -> list[Message]:
    if is_messages(history):
        return as_conversation(history, "history")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]
