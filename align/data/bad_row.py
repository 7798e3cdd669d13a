"""What is wrong with a row, as the user who mends it reads it."""

import re

LONGEST = 500
"""Characters of what a row holds, or of its names, that a refusal shows."""
UNSHOWN = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class BadRow(ValueError):
    """A malformed row: what is wrong with which field, and the remedy."""

    def __init__(self, field: str | None, problem: str, remedy: str, *, raw: str | None = None) -> None:
        super().__init__(field, problem, remedy)
        self.field, self.problem, self.remedy = field, problem, remedy
        self.raw = raw
        """The row as the file holds it, where it is no JSON."""

    def message(self, source: str, number: int) -> str:
        """The refusal as a user reads it."""
        field = f", field {shown(self.field)}" if self.field else ""
        return f"{source}, row {number}{field}: {shown(self.problem)}; {shown(self.remedy, 2 * LONGEST)}"


def shown(text: str, longest: int = LONGEST) -> str:
    """A text on one line of bounded length, without what no terminal shows."""
    text = text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return UNSHOWN.sub(lambda match: repr(match[0])[1:-1], text)


def kind(value: object) -> str:
    """A value's JSON type, in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
