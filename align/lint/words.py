"""Words."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from align.lint.base import CHECK, Check, Finding, TextRow, np
from align.lint.pairs import Pairs, Sparse, logistic, pairs_of, reached

WORD = re.compile(r"\w+|[^\w\s]|\n")
VOCABULARY = 4000
LONGEST = 4000
"""Characters of a completion that are counted."""
SHOWN = 6


@CHECK.add
class Words(Check):
    """What a judge of word counts alone reaches on the pairs: logistic regression on the difference of their
    logarithms, cross-validated by prompt. A model that learns no more has learnt words, not what is asked for."""

    name = "words"
    bad = "it is right in 80 % of the pairs or more, two standard errors below included"
    cheap = False

    @classmethod
    def find(cls, rows: Sequence[TextRow]) -> Finding | None:
        pairs = pairs_of(rows)
        if pairs is None:
            return None
        features, names = differences(pairs)

        def fit(learn_from: Any) -> Any:
            found = logistic(features.rows(learn_from), pairs.weight[learn_from])
            return lambda at: features.rows(at).times(found)

        own = reached(pairs, fit)
        order = np.argsort(logistic(features, pairs.weight))
        liked, disliked = ([repr(names[k]) for k in best] for best in (order[: -SHOWN - 1 : -1], order[:SHOWN]))
        words = (
            f"a judge of word counts alone is right in {100 * own.accuracy:.1f} ± {100 * own.error:.1f} % of the pairs "
            f"({pairs.lists} lists, cross-validated), length included; it likes {', '.join(liked)} and dislikes "
            f"{', '.join(disliked)}"
        )
        figures = {"accuracy": own.accuracy, "error": own.error, "lists": pairs.lists}
        return cls.finding(words, figures, bad=own.accuracy - 2 * own.error >= 0.8)


def differences(pairs: Pairs) -> tuple[Sparse, list[str]]:
    """Of each pair log(1 + n) of the better one's words less the worse one's; and the words: the most frequent
    of those that differ in at least two pairs."""
    logs = np.log1p(np.arange(LONGEST + 1)).tolist()
    counted = {text: Counter(WORD.findall(text[:LONGEST].lower())) for text in {*pairs.better, *pairs.worse}}
    differ: list[dict[str, float]] = []
    for better, worse in zip(pairs.better, pairs.worse, strict=True):
        own, other = counted[better], counted[worse]
        words = [word for word in sorted(own.keys() | other.keys()) if own[word] != other[word]]
        differ.append({word: logs[own[word]] - logs[other[word]] for word in words})
    frequent = Counter(word for own in differ for word in own).most_common(VOCABULARY)
    names = sorted(word for word, count in frequent if count > 1)
    number = {word: k for k, word in enumerate(names)}
    found = [(pair, number[word], by) for pair, own in enumerate(differ) for word, by in own.items() if word in number]
    entries = np.array(found, dtype=np.float64).reshape(-1, 3)
    row, column = entries[:, 0].astype(np.int64), entries[:, 1].astype(np.int64)
    return Sparse(row, column, entries[:, 2], (len(differ), len(names))), names
