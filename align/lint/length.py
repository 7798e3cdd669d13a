"""Length."""

from collections.abc import Sequence
from typing import Any

from align.lint.base import CHECK, Check, Finding, TextRow, np
from align.lint.pairs import pairs_of, reached


@CHECK.add
class Length(Check):
    """What a judge of length alone reaches on the pairs: always the longer or always the shorter, as the other folds
    say."""

    name = "length"
    bad = "it is right in 70 % of the pairs or more, two standard errors below included"

    @classmethod
    def find(cls, rows: Sequence[TextRow]) -> Finding | None:
        pairs = pairs_of(rows)
        if pairs is None:
            return None
        ratio = np.log([(1 + len(b)) / (1 + len(w)) for b, w in zip(pairs.better, pairs.worse, strict=True)])

        def fit(learn_from: Any) -> Any:
            sides = np.sign(ratio[learn_from]) @ pairs.weight[learn_from]
            return lambda at: np.sign(sides) * ratio[at]

        own = reached(pairs, fit)
        longer = float(np.average((np.sign(ratio) + 1) / 2, weights=pairs.weight))
        mean = float(np.average(ratio, weights=pairs.weight))
        spread = float(np.average((ratio - mean) ** 2, weights=pairs.weight)) ** 0.5
        effect = f", {abs(mean) / spread:.2f} standard deviations" if spread > 1e-9 else ""
        words = (
            f"in {100 * longer:.1f} % of the pairs the longer one is better: a judge of length alone is right in "
            f"{100 * own.accuracy:.1f} ± {100 * own.error:.1f} % ({pairs.lists} lists). The better one is "
            f"{np.exp(mean):.2f} times as long, as a geometric mean{effect}"
        )
        figures = {
            "accuracy": own.accuracy,
            "error": own.error,
            "longer_is_better": longer,
            "ratio": float(np.exp(mean)),
        }
        return cls.finding(words, figures | {"lists": pairs.lists}, bad=own.accuracy - 2 * own.error >= 0.7)
