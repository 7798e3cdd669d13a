"""What formats of two answers share: who won becomes grades, and a signed preference its strength."""

from align.data.bad_row import kind
from align.data.schema import BadRow, UnusableRow

WINS = {0: [1.0, 0.0], 1: [0.0, 1.0], None: [0.5, 0.5]}
"""The place of the better of two answers, or None for a tie -> their grades."""
STRENGTH = "strength"
"""Column that keeps how strong a preference is, for `strength_field`."""


def winner_of(value: object, field: str) -> list[float]:
    """The grades of two answers of which the better one's number, 0 or 1, is given.

    Raises:
        BadRow: it is neither.
    """
    if value not in (0, 1):
        raise BadRow(field, f"{value!r} is neither 0 nor 1", "give the number of the better answer, or remove the row")
    return WINS[int(value)]  # type: ignore[call-overload]


def signed(value: object, field: str, most: int) -> tuple[list[float], float]:
    """The grades and the strength of a preference from -most (the first answer is better) to most; 0 is a tie.

    Raises:
        BadRow: no number, or one beyond that.
        UnusableRow: -100, which NVIDIA writes where neither answer is valid.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(field, f"{kind(value)}, not a number", f"give a number from -{most} to {most}")
    if value == -100:
        raise UnusableRow("neither answer is valid")
    if not -most <= value <= most:
        raise BadRow(field, f"{value} is beyond {most}", f"give a number from -{most} to {most}, or remove the row")
    return WINS[None if value == 0 else int(value > 0)], float(abs(value))
