"""Win rates of one model over a baseline: plain, and with the judge's taste for length taken out.

Shapes: n judged rows, G rows of gamed baselines. A label is the probability that the model wins: 0, 1 or between.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

C_GRID = tuple(float(10.0**k) for k in np.linspace(-4, 4, 10))
"""Inverse strengths of the L1 penalty that cross-validation chooses among."""
FOLDS = 5
GAMED_WEIGHT = 0.1
"""Of a gamed row beside an annotated one: 0.2, shared by two gamed baselines."""


@dataclass(frozen=True)
class Gamed:
    """The baseline against itself when asked to be brief or long: what length alone is worth to the judge."""

    length: Array
    """[G] from `length_feature`, of each gamed baseline by itself."""
    difficulty: Array
    """[G]"""
    labels: Array
    """[G]"""


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal lengths, and the model that says so."""

    win_rate: float
    """Percent."""
    standard_error: float | None
    """Percent, over instructions and the judge's labels; None for one instruction."""
    weights: tuple[float, float, float]
    """Of length, difficulty and model."""
    c: float
    """Inverse strength of the L1 penalty."""


def win_rate(labels: ArrayLike) -> dict[str, Any]:
    """100 times the mean label, a tie being 0.5, with its standard error, and what was won, lost and tied.

    Args:
        labels: [n], n >= 1, from 0 (the baseline wins) to 1.

    Returns:
        `win_rate`, `standard_error` (std with ddof 1 over sqrt n; None for one row) and `discrete_win_rate` (labels
        rounded to a win, a loss or a tie), in percent; `wins`, `losses`, `ties`.

    Source: AlpacaEval 2, as in github.com/tatsu-lab/alpaca_eval
    """
    y = np.asarray(labels, dtype=np.float64)
    wins, losses = int((y > 0.5).sum()), int((y < 0.5).sum())
    ties = len(y) - wins - losses
    return {
        "win_rate": 100 * float(y.mean()),
        "standard_error": 100 * float(y.std(ddof=1)) / math.sqrt(len(y)) if len(y) > 1 else None,
        "discrete_win_rate": 100 * (wins + ties / 2) / len(y),
        **{"wins": wins, "losses": losses, "ties": ties},
    }


def length_feature(baseline: ArrayLike, model: ArrayLike) -> Array:
    """tanh((baseline - model) / std), std with ddof 1 over the rows; 0 where all differences are the same.

    Args:
        baseline, model: [n] characters of the two answers of a row.

    Returns:
        [n]

    Source: Length-Controlled AlpacaEval, arXiv:2404.04475
    """
    gap = np.asarray(baseline, dtype=np.float64) - np.asarray(model, dtype=np.float64)
    std = gap.std(ddof=1) if len(gap) > 1 else 0.0
    return np.tanh(gap / std) if std else np.zeros_like(gap)


def length_controlled(
    labels: ArrayLike,
    length: ArrayLike,
    difficulty: ArrayLike | None = None,
    *,
    gamed: Gamed | None = None,
    c: float | None = None,
    clusters: ArrayLike | None = None,
) -> LengthControlled:
    """The win rate that a logistic model expects at equal lengths.

    P(model wins) = sigmoid(z),  z = w_length * length + w_difficulty * difficulty + w_model
    minimise  sum softplus(z) - label * z  (+ 0.1 of the same over the gamed rows, without w_model) + |w|_1 / C
    win rate = 100 mean sigmoid(z with length 0)

    Where the penalty would leave w_model at 0, so that it and not the data says 50, and where no row's lengths differ
    from the others', w_model goes free of it; then mean sigmoid(z) is the mean label, and at equal lengths the win rate
    is the plain one.

    Args:
        labels: [n]
        length: [n], from `length_feature`.
        difficulty: [n], how hard the instruction is for the baseline; None leaves the term out.
        gamed: None leaves them out.
        c: inverse strength of the penalty; None chooses from `C_GRID` by five-fold cross-validation of the log loss.
        clusters: [n], a number for each instruction where it has several rows; None where each row has its own.

    Returns:
        With a standard error that takes penalty, gamed rows and length scale as given, and instructions and labels as
        drawn; the public leaderboard's is smaller, it holds the three weights fixed.

    Source: Length-Controlled AlpacaEval, arXiv:2404.04475; the standard error (sandwich estimator) and the free weight:
    ours
    """
    y = np.asarray(labels, dtype=np.float64)
    hard = np.zeros_like(y) if difficulty is None else np.asarray(difficulty, dtype=np.float64)
    x = np.stack([np.asarray(length, dtype=np.float64), hard, np.ones_like(y)], axis=1)
    rows = Rows(x, y, np.ones_like(y)) if gamed is None else _with_gamed(x, y, gamed)
    c = _cross_validated(rows) if c is None else c
    w = _fit(rows, c)
    moves = w != 0  # the penalty holds the others at 0
    if w[2] == 0 or not x[:, 0].any():
        w = _fit(rows, c, free_model=True)
        moves = np.array([w[0] != 0, w[1] != 0, True])
    expected = _sigmoid(x[:, 1:] @ w[1:])
    groups = np.arange(len(y)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    error = 100 * _standard_error(rows, groups, expected, w, np.flatnonzero(moves)) if groups.max() else None
    return LengthControlled(100 * float(expected.mean()), error, (float(w[0]), float(w[1]), float(w[2])), c)


@dataclass(frozen=True)
class Rows:
    """What the model is fitted to; the judged rows stand last."""

    x: Array
    """[rows, 3]"""
    y: Array
    weight: Array

    def part(self, keep: NDArray[np.bool_]) -> "Rows":
        """Some of the rows."""
        return Rows(self.x[keep], self.y[keep], self.weight[keep])


def _with_gamed(x: Array, y: Array, gamed: Gamed) -> Rows:
    others = np.stack([gamed.length, gamed.difficulty, np.zeros_like(gamed.labels)], axis=1)
    weight = np.concatenate([np.full(len(others), GAMED_WEIGHT), np.ones_like(y)])
    return Rows(np.concatenate([others, x]), np.concatenate([gamed.labels, y]), weight)


def _log_loss(rows: Rows, w: Array) -> float:
    z = rows.x @ w
    return float(rows.weight @ (np.logaddexp(0, z) - rows.y * z))


def _hessian(rows: Rows, w: Array) -> Array:
    p = _sigmoid(rows.x @ w)
    return (rows.x * (rows.weight * p * (1 - p))[:, None]).T @ rows.x


def _fit(rows: Rows, c: float, *, free_model: bool = False) -> Array:
    """The weights [3]: Newton's method, each step's quadratic with the L1 penalty solved by coordinate descent."""
    strength = np.array([1, 1, 0 if free_model else 1]) / c

    def value(w: Array) -> float:
        return _log_loss(rows, w) + float(strength @ np.abs(w))

    w = np.zeros(rows.x.shape[1])
    for _ in range(100):
        gradient = rows.x.T @ (rows.weight * (_sigmoid(rows.x @ w) - rows.y))
        step = _lasso(_hessian(rows, w), gradient, w, strength) - w
        size, before = 1.0, value(w)
        while value(w + size * step) > before * (1 + 1e-12) and size > 1e-6:
            size /= 2
        w = w + size * step
        if np.abs(step).max() < 1e-9:
            break
    return w


def _lasso(hessian: Array, gradient: Array, w: Array, strength: Array) -> Array:
    """argmin over v of gradient (v - w) + (v - w) hessian (v - w) / 2 + strength |v|."""
    v = w.copy()
    present = np.flatnonzero(hessian.diagonal())  # a feature that is 0 everywhere keeps its weight of 0
    for _ in range(1000):
        last = v.copy()
        for j in present:
            slope = gradient[j] + hessian[j] @ (v - w) - hessian[j, j] * v[j]
            v[j] = -np.sign(slope) * max(abs(slope) - strength[j], 0) / hessian[j, j]
        if np.abs(v - last).max() < 1e-12:
            break
    return v


def _cross_validated(rows: Rows) -> float:
    """The C whose fits foretell left-out rows best, gamed ones among them; of equals the smallest."""
    fold = np.arange(len(rows.y)) % FOLDS

    def loss(c: float) -> float:
        return sum(
            _log_loss(rows.part(fold == k), _fit(rows.part(fold != k), c)) for k in range(min(FOLDS, len(rows.y)))
        )

    return min(C_GRID, key=loss)


def _standard_error(rows: Rows, groups: NDArray[np.intp], expected: Array, w: Array, free: NDArray[np.intp]) -> float:
    """From every instruction's influence on the win rate: that of its judged rows, which is their own expectation, and
    how far they move the free weights."""
    n = len(groups)
    x = rows.x[-n:]
    slope = ((expected * (1 - expected))[:, None] * x * [0.0, 1.0, 1.0]).mean(axis=0)[free]
    pull = x[:, free] * (rows.y[-n:] - _sigmoid(x @ w))[:, None]
    moved = np.linalg.pinv(_hessian(rows, w)[np.ix_(free, free)]) @ slope
    influence = (expected - expected.mean()) / n + (pull - pull.mean(axis=0)) @ moved
    own = np.bincount(groups, influence)
    return float(np.sqrt((own**2).sum() * len(own) / (len(own) - 1)))


def _sigmoid(z: Array) -> Array:
    return 0.5 * (1 + np.tanh(z / 2))
