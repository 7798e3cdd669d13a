"""Rows of several completions: a list of texts, or of objects that hold a text and its grade."""

from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format
from align.data.parts import ITEM_ATTRIBUTES, ITEM_REWARDS, as_grades, list_grades, parts_of, take, take_prompt
from align.data.schema import ATTRIBUTES, BadRow, is_messages

LISTS = ("items", "completions", "responses", "all_generated_responses", "answers")
ITEM_TEXTS = ("text", "completion", "response", "answer", "content")


@FORMAT.add
class Items(Format):
    """A list of objects, under any of the names of lists, that hold a text and its grade, score, rating or rank."""

    name = "items"
    shape = "{prompt, items: [{text, score}]}"
    any_of = LISTS
    before = ("lists",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        name = next((name for name in LISTS if name in columns), None)
        return name is not None and is_messages(columns[name]) and "role" not in columns[name][0]

    @staticmethod
    def read(columns: Columns) -> Columns:
        name = next(name for name in LISTS if name in columns)
        items = columns.pop(name)
        text = next((key for key in ITEM_TEXTS if key in items[0]), None)
        if text is None:
            remedy = f"name it one of {', '.join(ITEM_TEXTS)}"
            raise BadRow(f"{name}[0]", f"no text (keys: {', '.join(items[0])})", remedy)
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
        read = (text, key, rated)
        unread = {f"{name}[].{other}": [item.get(other) for item in items] for other in others if other not in read}
        return {**parts_of(take_prompt(columns), texts, f"{name}[{{}}].{text}", **grades), "unread": unread}


@FORMAT.add
class Lists(Format):
    """A prompt and a list of completions, which may be called `responses`, `answers`, `items` or
    `all_generated_responses`, with grades, rewards, scores, ratings or ranks beside it; Align's own form is one.
    """

    name = "lists"
    shape = "{prompt, completions, grades | rewards | ranks}"
    any_of = LISTS
    before = ("preference_sets",)

    @staticmethod
    def read(columns: Columns) -> Columns:
        name = next(name for name in LISTS if name in columns)
        completions = columns.pop(name)
        return parts_of(take_prompt(columns), completions, f"{name}[{{}}]", **list_grades(columns))
