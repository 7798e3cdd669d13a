"""Rows of one completion beside its prompt."""

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.formats.conversations import ends_with_answer
from align.data.parts import ITEM_ATTRIBUTES, parts_of, single_grade, take_prompt
from align.data.schema import ATTRIBUTES

COMPLETIONS = ("completion", "response")


@FORMAT.add
class Completion(Format):
    """One completion, also called `response`, with a `label` (true is good), a score, ratings by name, or neither."""

    name = "completion"
    shape = "{prompt, completion, label}"
    any_of = COMPLETIONS
    before = ("conversation",)

    @classmethod
    def holds_answers(cls, columns: Columns) -> bool:
        return "completion" in columns or ends_with_answer(columns)

    @staticmethod
    def read(columns: Columns) -> Columns:
        name = next(name for name in COMPLETIONS if name in columns)
        completion = columns.pop(name)
        rated = next((key for key in ITEM_ATTRIBUTES if isinstance(columns.get(key), dict)), None)
        if rated is not None:
            columns[ATTRIBUTES] = [columns.pop(rated)]
        return parts_of(take_prompt(columns), [completion], (name,), **single_grade(columns))
