"""Scripts."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from align.lint.base import CHECK, Check, Finding, TextRow, share

LETTERS = 400
"""Characters of a text that are looked at."""
JOINT = {"HIRAGANA": "Japanese", "KATAKANA": "Japanese", "CJK": "Han", "HANGUL": "Hangul"}


@CHECK.add
class Scripts(Check):
    """Which scripts the rows are written in, and completions in another one than their prompt. Scripts, not languages:
    English and French are both Latin."""

    name = "scripts"
    bad = "a tenth of the completions are in another script than their prompt"

    @classmethod
    def find(cls, rows: Sequence[TextRow]) -> Finding | None:
        mixed: Counter[str] = Counter()
        places, completions, other = [], 0, 0
        for row in rows:
            asked = script_of(row.prompt)
            answers = [script_of(text) for text in row.completions]
            mixed.update(script for script in (asked, *answers) if script)
            differ = sum(bool(asked and own) and own != asked for own in answers)
            completions += len(answers)
            other += differ
            places += [row.place] * bool(differ)
        if len(mixed) < 2:
            return None
        total = sum(mixed.values())
        told = ", ".join(f"{script} {100 * count / total:.1f} %" for script, count in mixed.most_common(5))
        words = (
            f"{told} of {total} texts ({len(rows)} rows); {share(other, completions)} completions are in another "
            "script than their prompt. Languages of one script are not told apart"
        )
        figures = {"other_script": other / completions, "rows": len(rows)}
        return cls.finding(words, figures, bad=other >= 0.1 * completions, places=places)


def script_of(text: str) -> str:
    """The script of most of a text's letters; empty where it has none."""
    start = text[:LETTERS]
    if start.isascii() or not any(letter > "\x7f" and letter.isalpha() for letter in start):
        return "Latin" if any(map(str.isalpha, start)) else ""
    counts = Counter(_script(letter) for letter in start if letter.isalpha())
    if counts["Japanese"]:
        counts["Japanese"] += counts.pop("Han", 0)
    return max(counts, key=counts.__getitem__) if counts.total() else ""


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "unknown").split()[0]
    return JOINT.get(name, name.capitalize())
