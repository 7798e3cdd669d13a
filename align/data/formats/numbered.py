"""Two answers in columns with a number or a letter, and a verdict that names the better one by it."""

import re
from typing import Any

from align.data.columns import Columns
from align.data.delimited import typed_cell
from align.data.formats.base import FORMAT, Format
from align.data.formats.respelled import read_as_general
from align.data.formats.verdicts import WINS
from align.data.parts import has_prompt
from align.data.schema import BadRow, is_finite

SIDE = re.compile(r"(output|response|answer|completion|generation|candidate|text)([_-]?)([012ab])", re.IGNORECASE)
NUMBERINGS = ("12", "01", "ab")
VERDICTS = ("winner", "preference", "label", "better", "preferred", "choice")
TIES = ("tie", "tied", "draw", "both")
OTHERS = ("chosen", "rejected", "completions", "completion", "response", "output")


@FORMAT.add
class NumberedPair(Format):
    """Two answers in columns that end with 1 and 2, 0 and 1, or a and b, and which is better by that ending (`2`, `b`,
    `output_2`), or `tie`. A `preference` from 1 to 2 less 1 is the share of votes for the second, and 0 a tie, as
    AlpacaFarm and AlpacaEval write it.

    Source: tatsu-lab/alpaca_farm (`preference`), princeton-nlp/LLMBar (`label`)
    """

    name = "numbered_pair"
    shape = "{instruction, input, output_1, output_2, preference | label | winner}"
    published = "AlpacaFarm, LLMBar"
    any_of = VERDICTS
    numbers = ("preference",)
    keeps = ("raw_preference", "generator", "generator_1", "generator_2", "annotator")
    before = ("alpaca", "items", "lists")

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        if not super().detect(columns) or not columns.keys().isdisjoint(OTHERS):
            return False
        return len(_sides(columns)) == 2 and has_prompt(columns)

    @staticmethod
    def read(columns: Columns) -> Columns:
        sides = _sides(columns)
        field = next(name for name in VERDICTS if name in columns)
        grades = _grades(columns.pop(field), field, sides)
        columns["completions"] = [columns.pop(name) for name in sides.values()]
        columns["grades"] = grades
        parts = read_as_general(columns, {"grades": field})
        parts["names"]["completions"] = tuple(sides.values())
        return parts


def _sides(columns: Columns) -> dict[str, str]:
    """Ending -> column, of the only two columns that are such sides; empty where they are not just two."""
    found = {match[3].lower(): name for name in columns if (match := SIDE.fullmatch(name))}
    stems = {(match[1], match[2]) for name in columns if (match := SIDE.fullmatch(name))}
    numbering = next((own for own in NUMBERINGS if found.keys() == set(own)), "")
    return {ending: found[ending] for ending in numbering} if len(stems) == 1 else {}


def _grades(value: Any, field: str, sides: dict[str, str]) -> list[float]:
    said = typed_cell(value) if isinstance(value, str) else value
    numbered = isinstance(said, int | float) and not isinstance(said, bool)
    if field == "preference" and [*sides] == ["1", "2"] and numbered and (said == 0 or 1 <= said <= 2):
        return [2.0 - said, said - 1.0] if said else WINS[None]
    named = f"{said:g}" if numbered and is_finite(said) else str(said).strip().lower()
    if named in TIES:
        return WINS[None]
    by = {**{ending: k for k, ending in enumerate(sides)}, **{name.lower(): k for k, name in enumerate(sides.values())}}
    if named not in by:
        problem = f"{value!r} names neither `{'` nor `'.join(sides.values())}`"
        raise BadRow(field, problem, f"give {', '.join(sides)} or tie, or remove the row")
    return WINS[by[named]]
