"""Refusals."""

import re
from collections.abc import Callable, Sequence

from align.lint.base import CHECK, Check, Finding, TextRow, share

REFUSAL = re.compile(
    r"^\W*(?:(?:i['’]?m|i am|we['’]?re)\s+(?:really\s+|very\s+|so\s+)?sorry\b|sorry\b"
    r"|my apologies|i apologi[sz]e\b|as an ai\b"
    r"|i(?:['’]?m| am) (?:not able|unable|not comfortable|just an ai)|i (?:cannot|can['’]?t|can not|won['’]?t|will not"
    r"|do not feel comfortable|don['’]?t feel comfortable|must decline|must respectfully decline)\b)",
    re.IGNORECASE,
)


@CHECK.add
class Refusals(Check):
    """Best completions that begin as a refusal or an apology does, beside the worst ones: English phrases, no more."""

    name = "refusals"
    bad = "more than a fifth of the best completions do"

    @classmethod
    def find(cls, rows: Sequence[TextRow]) -> Finding | None:
        best = [row.completions[_place(row, max)] for row in rows]
        lists = [row for row in rows if len(set(row.grades)) > 1]
        worst = [row.completions[_place(row, min)] for row in lists]
        refused = [bool(REFUSAL.match(text)) for text in best]
        count, other = sum(refused), sum(bool(REFUSAL.match(text)) for text in worst)
        if not count and not other:
            return None
        words = f"{share(count, len(best))} of the best completions begin as a refusal or an apology does"
        if worst:
            words += f", {share(other, len(worst))} of the worst"
        figures = {"best": count / len(best), "rows": len(best)} | ({"worst": other / len(worst)} if worst else {})
        places = [row.place for row, own in zip(rows, refused, strict=True) if own]
        return cls.finding(words, figures, bad=count > 0.2 * len(best), places=places)


def _place(row: TextRow, choose: Callable[[tuple[float, ...]], float]) -> int:
    return row.grades.index(choose(row.grades)) if row.grades else 0
