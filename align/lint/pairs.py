"""The ordered pairs of lists, and how well a linear judge of some features orders those that it did not learn from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from align.lazy import LazyModule
from align.lint.base import TextRow, np

torch: Any = LazyModule("torch")
FOLDS = 5
FEW = 20
"""Lists, and different prompts, that a judge needs at least."""
PAIRS = 3000
"""Pairs of all lists together, roughly: of a list with more than its part a random choice."""
PENALTY = 1.0
"""Of the squared weights, half, against the sum over the lists: scikit-learn's LogisticRegression has it by default."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of completions of which one is graded higher."""

    better: list[str]
    worse: list[str]
    list_of: Any
    """[P] the list of each."""
    weight: Any
    """[P] one divided by the pairs of its list, so that every list counts once."""
    prompt_of: Any
    """[P] number of its prompt: rows of one prompt are learnt from together, or judged together."""

    @property
    def lists(self) -> int:
        return len(set(self.list_of.tolist()))


@dataclass(frozen=True)
class Reached:
    """How often a judge is right, as a mean over lists."""

    accuracy: float
    error: float
    """Standard error, over prompts."""


def pairs_of(rows: Sequence[TextRow]) -> Pairs | None:
    """The pairs of these rows; None where there are too few to say anything."""
    generator = np.random.default_rng(0)
    better, worse, list_of, weight, prompt_of = [], [], [], [], []
    numbers: dict[str, int] = {}
    most = max(1, PAIRS // max(1, len(rows)))
    for place, row in enumerate(rows):
        own = [(i, j) for i, j in combinations(range(len(row.grades)), 2) if row.grades[i] != row.grades[j]]
        if len(own) > most:
            own = [own[k] for k in generator.choice(len(own), most, replace=False)]
        for i, j in own:
            i, j = (i, j) if row.grades[i] > row.grades[j] else (j, i)
            better.append(row.completions[i])
            worse.append(row.completions[j])
            list_of.append(place)
            weight.append(1 / len(own))
            prompt_of.append(numbers.setdefault(" ".join(row.prompt.lower().split()), len(numbers)))
    found = Pairs(better, worse, np.array(list_of), np.array(weight), np.array(prompt_of))
    return found if found.lists >= FEW and len(set(prompt_of)) >= FEW else None


Fit = Callable[[Any], Callable[[Any], Any]]
"""Learns from the pairs of some places; then it gives those of others a number, above 0 for a pair in order."""


def reached(pairs: Pairs, fit: Fit) -> Reached:
    """Cross-validated share of pairs in the right order; a pair that the judge calls a tie counts one half.

    The standard error is that of the mean over prompts, whose pairs are not independent.
    """
    prompts = pairs.prompt_of.max() + 1
    fold = np.random.default_rng(0).permutation(prompts)[pairs.prompt_of] % FOLDS
    right = np.empty(len(fold))
    for held in range(FOLDS):
        judge, at = fit(np.flatnonzero(fold != held)), np.flatnonzero(fold == held)
        right[at] = (np.sign(judge(at)) + 1) / 2
    accuracy = float(np.average(right, weights=pairs.weight))
    off = np.bincount(pairs.prompt_of, weights=pairs.weight * (right - accuracy))
    return Reached(accuracy, math.sqrt(float((off**2).sum())) / float(pairs.weight.sum()))


@dataclass(frozen=True)
class Sparse:
    """A matrix [P, V] as its entries that are not 0."""

    row: Any
    column: Any
    value: Any
    shape: tuple[int, int]

    def rows(self, chosen: Any) -> "Sparse":
        """The matrix of these rows, in their order."""
        place = np.full(self.shape[0], -1)
        place[chosen] = np.arange(len(chosen))
        own = np.flatnonzero(place[self.row] >= 0)
        return Sparse(place[self.row[own]], self.column[own], self.value[own], (len(chosen), self.shape[1]))

    def times(self, weights: Any) -> Any:
        """The product [P] with weights [V]."""
        return np.bincount(self.row, weights=self.value * weights[self.column], minlength=self.shape[0])

    def across(self, values: Any) -> Any:
        """The product [V] of values [P] with the matrix."""
        return np.bincount(self.column, weights=self.value * values[self.row], minlength=self.shape[1])


def logistic(features: Sparse, weight: Any) -> Any:
    """The weights [V] that minimise sum_p weight_p log(1 + exp(-x_p w)) + PENALTY / 2 |w|^2; no intercept, as a pair
    and its mirror image are the same.

    Args:
        features: the better one's less the worse one's, a row for each pair.
        weight: [P].
    """
    found = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=40, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Any:
        now = found.detach().numpy()
        margin = features.times(now)
        pull = weight / (1 + np.exp(margin.clip(-500, 500)))
        found.grad = torch.from_numpy(PENALTY * now - features.across(pull))
        return float((weight * np.logaddexp(0, -margin)).sum() + PENALTY / 2 * (now**2).sum())

    optimizer.step(loss)
    return found.detach().numpy()
