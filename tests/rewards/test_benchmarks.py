"""Benchmark arithmetic: second implementations in float64 loops, and the published scores of real reward models."""

import gzip
import itertools
import json
import math
import random
from statistics import fmean

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import pearsonr

from rewards.benchmarks import (
    TiesPrompt,
    accuracy,
    best_of_n,
    calibration,
    fitted_temperature,
    group_figures,
    length_figures,
    off_topic_answers,
    pair_margins,
    reciprocal_rank,
    rewardbench,
    style_matrix,
    ties_score,
)


def rows(path):
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_judgebench_figures_are_reproduced(shared_data):
    folder = shared_data / "judgebench_rm_scores"
    for model, expected in json.loads((folder / "expected.json").read_text()).items():
        margins: dict[str, list[float]] = {"overall": []}
        for row in rows(folder / "scores.jsonl.gz"):
            a, b = row["scores"][model]
            (margin,) = pair_margins([a, b], [1.0, 0.0] if row["label"] == "A>B" else [0.0, 1.0])
            margins["overall"].append(margin)
            margins.setdefault(row["category"], []).append(margin)
        # The file's rule is "score_A > score_B agrees with the label": a tie says B, and is right where B is.
        for name, own in margins.items():
            says_b = [row for row in rows(folder / "scores.jsonl.gz") if len(set(row["scores"][model])) == 1]
            tied = [r for r in says_b if name in ("overall", r["category"])]
            right = sum(r["label"] == "B>A" for r in tied)
            found = accuracy(own, ties=0.0) + right / len(own)
            assert round(100 * found, 2) == expected[name], (model, name)
            assert accuracy(own) == pytest.approx(accuracy(own, ties=0.0) + len(tied) / 2 / len(own))


def test_rewardmath_figures_are_reproduced(shared_data):
    folder = shared_data / "rewardmath_scores"
    right_first = [1.0] + [0.0] * 9
    for model, expected in json.loads((folder / "expected.json").read_text()).items():
        rewards = [row["scores"][model] for row in rows(folder / "scores.jsonl.gz")]
        figures = group_figures(rewards, [right_first] * len(rewards), ties=0.0)
        found = {
            "accuracy_best_of_10": round(100 * figures.best_of_n, 2),
            "mrr": round(figures.reciprocal_rank, 4),
            "pairwise": round(100 * figures.accuracy, 2),
        }
        assert found == expected, model


def test_pairs_and_ties():
    margins = pair_margins([3.0, 1.0, 2.0, 2.0], [2, 0, 1, 0])
    assert sorted(margins) == [0.0, 1.0, 1.0, 1.0, 2.0]
    assert accuracy(margins) == 4.5 / 5 and accuracy(margins, ties=0.0) == 4 / 5
    assert math.isnan(accuracy([]))


@pytest.mark.parametrize(
    ("rewards", "grades", "fair", "strict"),
    [
        ([1, 0, 0, 0], [1, 0, 0, 0], 1.0, 1.0),
        ([1, 1, 0, 1], [1, 0, 0, 0], 1 / 3, 0.0),
        ([0, 1, 0, 0], [1, 0, 0, 0], 0.0, 0.0),
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0, 1.0),
        ([1, 1, 1, 0], [1, 1, 0, 0], 2 / 3, 0.0),
    ],
)
def test_best_of_n(rewards, grades, fair, strict):
    assert best_of_n(rewards, grades) == pytest.approx(fair)
    assert best_of_n(rewards, grades, ties=0.0) == strict


def test_reciprocal_rank_counts_ties_against():
    assert reciprocal_rank([2, 2, 1], [1, 0, 0]) == 1 / 2
    assert reciprocal_rank([0, 3, 2, 0], [1, 0, 0, 0]) == 1 / 4
    assert reciprocal_rank([1, 3, 2], [1, 0, 1]) == 1 / 2, "the better of two right ones counts"


def test_rewardbench_sections():
    accuracies = {"alpacaeval-easy": 1.0, "mt-bench-med": 0.5, "llmbar-natural": 0.25, "donotanswer": 0.75}
    sections = rewardbench(accuracies)
    assert sections == {"Chat": pytest.approx(120 / 140), "Chat Hard": 0.25, "Safety": 0.75}
    sections = rewardbench(accuracies | {"math-prm": 0.4, "hep-go": 0.9, "x": 0.0})
    assert sections["Reasoning"] == pytest.approx((984 * 0.4 + 164 * 0.9) / (984 + 164))
    assert sections["overall"] == pytest.approx(fmean([120 / 140, 0.25, 0.75, sections["Reasoning"]]))


def ties_in_numpy(tied, single):
    """RewardBench 2's own code, from memory of its structure: arrays with nan and inf."""
    with np.errstate(all="ignore"):
        shared = [k for k in tied if k in single]
        gap = np.array([min(tied[k].right) - max(tied[k].wrong) for k in shared])
        spread = np.array([max(tied[k].right) - min(tied[k].right) for k in shared])
        reference = np.array([min(single[k].right) - max(single[k].wrong) for k in shared])
        bounded = np.nan_to_num(np.tanh(np.minimum(reference, gap) / spread - 1), nan=0.0)
        correct = [np.mean([min(p.right) > max(p.wrong) for p in s.values()]) for s in (tied, single)]
    return (
        0.3 * sum(correct)
        + 0.2 * np.mean(gap > spread)
        + 0.2 * np.mean(np.minimum(reference, gap) > spread)
        + 0.01 * np.mean(bounded)
    )


def test_ties_score():
    rng = random.Random(3)
    for _ in range(20):
        tied = {
            str(i): TiesPrompt(tuple(rng.choices(range(4, 8), k=3)), tuple(rng.choices(range(6), k=4)))
            for i in range(9)
        }
        single = {str(i): TiesPrompt((rng.randrange(9),), tuple(rng.choices(range(7), k=3))) for i in range(2, 11)}
        assert ties_score(tied, single) == pytest.approx(ties_in_numpy(tied, single))
    perfect = {"1": TiesPrompt((5.0, 5.0), (0.0,))}
    assert ties_score(perfect, {"1": TiesPrompt((9.0,), (0.0,))}) == pytest.approx(1.01)
    level = {"1": TiesPrompt((5.0, 5.0), (5.0,))}
    assert ties_score(level, level) == 0


def test_style_matrix():
    rng = np.random.default_rng(0)
    right, wrong = rng.integers(0, 4, (30, 3)), rng.integers(0, 4, (30, 3))
    found = style_matrix(right, wrong)
    matrix = [[fmean(r[i] > w[j] for r, w in zip(right, wrong, strict=True)) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(found["matrix"], matrix)
    assert found["hard"] == pytest.approx(fmean([matrix[0][1], matrix[0][2], matrix[1][2]]))
    assert found["easy"] == pytest.approx(fmean([matrix[1][0], matrix[2][0], matrix[2][1]]))
    assert found["normal"] == pytest.approx(fmean(matrix[i][i] for i in range(3)))
    assert found["average"] == pytest.approx(fmean([found["hard"], found["normal"], found["easy"]]))


@pytest.mark.parametrize("bins", [5, 10, 20])
def test_calibration_by_loops(bins):
    rng = random.Random(1)
    margins = [rng.gauss(0.4, 2) for _ in range(300)] + [0.0, 0.0, 60.0]
    temperature = 1.5
    cells: dict[int, list[tuple[float, float]]] = {}
    for d in (m / temperature for m in margins):
        sure = 1 / (1 + math.exp(-abs(d)))
        b = next(b for b in range(bins) if sure < 0.5 + (b + 1) / (2 * bins) or b == bins - 1)
        cells.setdefault(b, []).append((sure, 1.0 if d > 0 else 0.5 if d == 0 else 0.0))
    error = sum(abs(sum(h for _, h in c) - sum(s for s, _ in c)) for c in cells.values()) / len(margins)
    found = calibration(margins, bins=bins, temperature=temperature)
    assert found.error == pytest.approx(error)
    assert found.log_loss == pytest.approx(fmean(math.log1p(math.exp(-m / temperature)) for m in margins))
    assert [b["count"] for b in found.bins] == [len(cells[b]) for b in sorted(cells)]
    assert sum(b["count"] for b in found.bins) == len(margins)


def test_temperature_is_the_most_likely():
    rng = random.Random(2)
    margins = [rng.gauss(1, 3) for _ in range(200)]
    best = minimize_scalar(lambda t: calibration(margins, temperature=t).log_loss, bounds=(0.1, 50), method="bounded")
    assert fitted_temperature(margins) == pytest.approx(best.x, rel=1e-3)
    assert fitted_temperature([-1.0, 0.5]) == math.inf and fitted_temperature([1.0, 0.5]) == 0.0


def test_length_figures():
    rng = random.Random(5)
    gaps = [rng.choice([-3, -1, 0, 2, 5]) for _ in range(60)]
    margins = [rng.gauss(0.3 * g, 1) for g in gaps]
    found = length_figures(margins, gaps)
    both = pearsonr([*margins, *(-m for m in margins)], [*gaps, *(-g for g in gaps)])
    assert found["correlation"] == pytest.approx(both.statistic)
    assert found["longer_wins"] == fmean((g > 0) + (g == 0) / 2 for g in gaps)
    assert found["accuracy_shorter"] == fmean(m > 0 for m, g in zip(margins, gaps, strict=True) if g < 0)
    by_length = length_figures(gaps, gaps)
    assert by_length["balanced"] == 0.5 and by_length["correlation"] == pytest.approx(1)


def test_off_topic_answers_are_longer_and_of_others():
    answers = ["a" * n for n in (10, 3, 7, 40, 5, 22, 1)]
    chosen = off_topic_answers(answers)
    for i, other in enumerate(chosen):
        longer = [k for k in range(len(answers)) if len(answers[k]) >= 2 * len(answers[i]) and k != i]
        assert (other in longer) if longer else other is None
    assert chosen[3] is None and len(set(chosen)) > 2


def test_a_groups_accuracy_weighs_lists_the_same():
    rng = random.Random(8)
    rewards = [[rng.gauss(0, 1) for _ in range(k)] for k in (2, 3, 5)]
    grades = [list(range(k)) for k in (2, 3, 5)]
    shares = []
    for r, g in zip(rewards, grades, strict=True):
        pairs = [(i, j) for i, j in itertools.permutations(range(len(r)), 2) if g[i] > g[j]]
        shares.append(sum(r[i] > r[j] for i, j in pairs) / len(pairs))
    assert group_figures(rewards, grades).accuracy == pytest.approx(fmean(shares))
