"""Win rates: against the published leaderboard, a second fit by scipy, and the jackknife."""

import csv
import gzip
import json
import math

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import minimize, root

from align.cli import main
from align.errors import UserError
from align.evaluate.annotations import evaluate_winrate
from align.evaluate.winrate import C_GRID, Gamed, length_controlled, length_feature, win_rate


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def fitted_by_scipy(x, y, others, other_labels, c):
    """The same objective with every weight split in two that are not negative, so that the penalty is smooth."""
    rows = np.concatenate([x, np.c_[others, np.zeros(len(others))]])
    labels, weight = np.r_[y, other_labels], np.r_[np.ones(len(y)), np.full(len(others), 0.1)]

    def value(parts):
        z = rows @ (parts[:3] - parts[3:])
        slope = rows.T @ (weight * (sigmoid(z) - labels))
        return weight @ (np.logaddexp(0, z) - labels * z) + parts.sum() / c, np.r_[slope, -slope] + 1 / c

    found = minimize(value, np.zeros(6), jac=True, bounds=[(0, None)] * 6, method="SLSQP", tol=1e-14)
    return found.x[:3] - found.x[3:]


def invented(n=200, seed=3):
    """Labels that a model with weights of length -1, difficulty 0.7 and model 0.5 draws."""
    rng = np.random.default_rng(seed)
    baseline, model = rng.integers(200, 2000, n), rng.integers(200, 2500, n)
    length, difficulty = length_feature(baseline, model), rng.normal(size=n)
    labels = (rng.random(n) < sigmoid(0.5 + 0.7 * difficulty - length)).astype(float)
    return labels, length, difficulty, baseline, model


def invented_gamed(n=100):
    rng = np.random.default_rng(8)
    length, difficulty = np.tanh(rng.normal(size=n)), rng.normal(size=n)
    return Gamed(length, difficulty, sigmoid(0.7 * difficulty - 1.5 * length))


def test_a_win_rate_is_the_mean_with_ties_as_halves():
    found = win_rate([1, 0, 0.5, 0.9])
    assert found["win_rate"] == pytest.approx(100 * (1 + 0 + 0.5 + 0.9) / 4)
    assert (found["wins"], found["losses"], found["ties"]) == (2, 1, 1)
    assert found["discrete_win_rate"] == pytest.approx(100 * (2 + 0.5) / 4)
    squares = sum((y - 0.6) ** 2 for y in (1, 0, 0.5, 0.9))
    assert found["standard_error"] == pytest.approx(100 * math.sqrt(squares / 3 / 4))
    assert win_rate([1])["standard_error"] is None


def test_the_length_feature_is_the_formula_written_out():
    assert length_feature([3, 5, 10], [1, 5, 4]) == pytest.approx([math.tanh(d / math.sqrt(28 / 3)) for d in (2, 0, 6)])
    assert length_feature([3, 5], [1, 3]).tolist() == [0, 0]


@pytest.mark.parametrize("c", [0.04, 0.1, 2.0, 1e4])
def test_the_fit_is_scipys(c):
    y, length, difficulty, *_ = invented()
    gamed = invented_gamed()
    found = length_controlled(y, length, difficulty, gamed=gamed, c=c)
    x = np.stack([length, difficulty, np.ones_like(length)], axis=1)
    expected = fitted_by_scipy(x, y, np.c_[gamed.length, gamed.difficulty], gamed.labels, c)
    assert found.weights == pytest.approx(expected.tolist(), abs=2e-5)
    assert found.win_rate == pytest.approx(100 * sigmoid(expected[1] * difficulty + expected[2]).mean(), abs=1e-3)


def test_a_length_controlled_win_rate_takes_length_out():
    """The judge only likes long answers, the model only writes them: at equal lengths nobody wins."""
    rng = np.random.default_rng(0)
    baseline, model = rng.integers(200, 2000, 1000), rng.integers(400, 2600, 1000)
    length = length_feature(baseline, model)
    labels = sigmoid(-3 * length)
    assert win_rate(labels)["win_rate"] > 60
    assert length_controlled(labels, length, c=1e4).win_rate == pytest.approx(50, abs=0.2)


def test_cross_validation_takes_the_c_that_foretells_best():
    y, length, difficulty, *_ = invented(60)
    gamed = invented_gamed(30)
    rows = np.concatenate(
        [np.stack([gamed.length, gamed.difficulty, np.zeros(30)], 1), np.stack([length, difficulty, np.ones(60)], 1)]
    )
    labels, judged = np.r_[gamed.labels, y], np.arange(90) >= 30

    def loss(c):
        total = 0.0
        for fold in range(5):
            kept = np.arange(90) % 5 != fold
            own, others = kept & judged, kept & ~judged
            w = fitted_by_scipy(rows[own], labels[own], rows[others][:, :2], labels[others], c)
            for j in np.flatnonzero(~kept):
                p = sigmoid(rows[j] @ w)
                total -= (1 if judged[j] else 0.1) * (labels[j] * math.log(p) + (1 - labels[j]) * math.log(1 - p))
        return total

    losses = [loss(c) for c in C_GRID]
    assert length_controlled(y, length, difficulty, gamed=gamed).c == C_GRID[int(np.argmin(losses))]
    assert 0 < np.argmin(losses) < len(losses) - 1


@pytest.mark.parametrize("c", [0.02, 20.0])
def test_the_standard_error_is_the_jackknifes(c):
    """Fits without one row each; the answers are short, and a small C pulls all weights to 0."""
    y, length, difficulty, *_ = invented(400)
    length += 0.5
    gamed = invented_gamed()
    found = length_controlled(y, length, difficulty, gamed=gamed, c=c)
    kept = [np.arange(400) != i for i in range(400)]
    rates = [length_controlled(y[k], length[k], difficulty[k], gamed=gamed, c=c).win_rate for k in kept]
    assert found.standard_error == pytest.approx(math.sqrt(399) * np.std(rates), rel=0.006)


@pytest.mark.parametrize(("n", "won"), [(10, 6), (73, 38), (73, 35), (805, 419), (805, 403), (4, 2), (5, 5), (5, 0)])
@pytest.mark.parametrize("hard", [False, True])
def test_at_equal_lengths_the_win_rate_is_the_plain_one(n, won, hard):
    """Whatever C cross-validation takes; nothing is to be taken out, and the penalty may not say 50."""
    labels = np.r_[np.ones(won), np.zeros(n - won)]
    difficulty = np.random.default_rng(n).permutation(np.linspace(-1, 1, n)) if hard else None
    for gamed in (None, invented_gamed()):
        found = length_controlled(labels, length_feature([70] * n, [70] * n), difficulty, gamed=gamed)
        assert found.win_rate == pytest.approx(100 * won / n, abs=1e-5)
        plain = win_rate(labels)["standard_error"]
        assert found.standard_error == pytest.approx(plain, rel=0.1 if hard else 1e-6, abs=1e-6)


def test_a_penalty_that_leaves_the_model_no_weight_is_taken_from_it():
    """The weights against scipy's, the model's without its share of the penalty."""
    y, length, difficulty, *_ = invented(60, seed=5)
    for c in (1e-4, 0.005, 0.03):
        found = length_controlled(y, length, difficulty, c=c)
        x = np.stack([length, difficulty, np.ones(60)], axis=1)

        def value(parts, x=x, c=c):
            z = x @ np.r_[parts[:2] - parts[2:4], parts[4]]
            slope = x.T @ (sigmoid(z) - y)
            return (
                (np.logaddexp(0, z) - y * z).sum() + parts[:4].sum() / c,
                np.r_[slope[:2] + 1 / c, 1 / c - slope[:2], slope[2]],
            )

        bounds = [(0, None)] * 4 + [(None, None)]
        fit = minimize(value, np.zeros(5), jac=True, bounds=bounds, method="SLSQP", tol=1e-14).x
        expected = np.r_[fit[:2] - fit[2:4], fit[4]]
        assert found.weights == pytest.approx(expected.tolist(), abs=1e-4), c
        assert found.win_rate == pytest.approx(100 * sigmoid(expected[1] * difficulty + expected[2]).mean(), abs=1e-3)
        assert found.standard_error is not None and found.standard_error > 1


@pytest.fixture
def alpaca_eval(shared_data):
    """Annotations by model, difficulties, gamed baselines, and the published figures.

    The gamed rows' labels are known by two sums only; a logistic model's with the same sums make the same fit.
    """
    folder = shared_data / "alpaca_eval2_lc"
    rows: dict[str, list] = {}
    with gzip.open(folder / "annotations.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["model"], []).append(row)
    with gzip.open(folder / "instructions.jsonl.gz", "rt") as file:
        difficulty = {own["index"]: own["instruction_difficulty"] for own in map(json.loads, file)}
    with gzip.open(folder / "gamed_lengths.jsonl.gz", "rt") as file:
        lengths = list(map(json.loads, file))
    sums = json.loads((folder / "constants.json").read_text())
    gaps = [
        np.array([own["len_baseline"] - own[side] for own in lengths], float) for side in ("len_concise", "len_verbose")
    ]
    scaled = np.concatenate([gap / gap.std(ddof=1) for gap in gaps])
    hard = np.array([difficulty[own["index"]] for own in lengths] * 2)
    x = np.stack([np.tanh(scaled), hard], axis=1)
    wanted = np.array([sums["S_tanh"], sums["S_difficulty"]])
    labels = sigmoid(x @ root(lambda w: x.T @ sigmoid(x @ w) - wanted, [0.0, 0.0]).x)
    published = json.loads((folder / "expected.json").read_text())
    return rows, difficulty, (scaled, hard, labels), published


def test_the_published_leaderboard(alpaca_eval):
    rows, difficulty, (scaled, hard, labels), published = alpaca_eval
    gamed = Gamed(np.tanh(scaled), hard, labels)
    ours, theirs = [], []
    for expected in published:
        own = rows[expected["model"]]
        y = [0.5 if float(row["preference"]) == 0 else float(row["preference"]) - 1 for row in own]
        plain = win_rate(y)
        assert plain["win_rate"] == pytest.approx(expected["published_win_rate"], abs=1e-9)
        assert plain["standard_error"] == pytest.approx(expected["published_standard_error"], abs=1e-9)
        assert plain["discrete_win_rate"] == pytest.approx(expected["published_discrete_win_rate"], abs=1e-9)
        counts = [expected[f"published_n_{name}"] for name in ("wins", "wins_base", "draws")]
        assert [plain["wins"], plain["losses"], plain["ties"]] == counts
        if "C" not in expected:  # the baseline itself
            continue
        length = length_feature([int(row["len_1"]) for row in own], [int(row["len_2"]) for row in own])
        hard_of_rows = [difficulty[int(row["position"])] for row in own]  # as the leaderboard looks them up
        found = length_controlled(y, length, hard_of_rows, gamed=gamed, c=expected["C"])
        assert found.win_rate == pytest.approx(expected["refit_lc_win_rate"], abs=1e-4)
        assert found.weights == pytest.approx(expected["refit_weights"], abs=1e-5)
        off = 0.2 if expected["model"] == "NullModel" else 0.02
        assert found.win_rate == pytest.approx(expected["published_lc_win_rate"], abs=off)
        ours.append(found.win_rate)
        theirs.append(expected["published_lc_win_rate"])
    assert np.argsort(ours).tolist() == np.argsort(theirs).tolist()
    assert len(ours) == 40


def write_gamed(path, scaled, hard, labels, indices):
    with path.open("w", newline="") as file:
        columns = ["index", "std_delta_len", "instruction_difficulty", "preference", "not_gamed_baseline", "model"]
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for values in zip(indices, scaled, hard, labels, strict=True):
            table.writerow(dict(zip(columns, [*values, False, "gamed"], strict=True)))
    return str(path)


def quiet() -> Console:
    return Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115


def test_the_command_gives_the_leaderboards_figure(alpaca_eval, tmp_path, capsys):
    """C is chosen here and not given, on labels of the gamed rows that are not the leaderboard's."""
    rows, difficulty, gamed, published = alpaca_eval
    expected = published[0]
    table = write_gamed(tmp_path / "df_gamed.csv", *gamed, [*difficulty, *difficulty])
    path = tmp_path / "annotations.json"
    own = [
        {
            "generator_1": "gpt4",
            "generator_2": expected["model"],
            "output_1": "x" * int(row["len_1"]),
            "output_2": "é" * int(row["len_2"]),
            "preference": float(row["preference"]),
        }
        for row in rows[expected["model"]]
    ]
    path.write_text(json.dumps(own))
    out = tmp_path / "out.json"
    main(["evaluate", "winrate", str(path), "--length-controlled", "--gamed", table, "--json", str(out)])
    figures = json.loads(out.read_text())
    assert figures["win_rate"] == pytest.approx(expected["published_win_rate"], abs=1e-9)
    assert figures["length_controlled"]["win_rate"] == pytest.approx(expected["published_lc_win_rate"], abs=0.16)
    assert figures["mean_length"]["model"] == pytest.approx(expected["published_avg_length"], abs=1)
    printed = capsys.readouterr().out
    assert f"{expected['published_win_rate']:.2f} %" in printed and "against gpt4" in printed


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_plain_preferences_and_what_is_left_out(tmp_path, capsys):
    winners = ["model", "model", "baseline", "tie", None]
    out = tmp_path / "out.json"
    path = write(tmp_path / "rows.jsonl", [{"winner": name} for name in winners])
    main(["evaluate", "winrate", path, "--json", str(out)])
    figures = json.loads(out.read_text())
    assert figures["rows"] == {"read": 5, "judged": 4, "without_a_preference": 1}
    assert figures["win_rate"] == pytest.approx(100 * (1 + 1 + 0 + 0.5) / 4)
    assert "length_controlled" not in figures and "mean_length" not in figures
    assert "1 rows without a preference" in capsys.readouterr().out
    scale = [{"preference": p} for p in (2, 1, 1.25, 0, 1.5, None, math.nan)]
    figures = evaluate_winrate(write(tmp_path / "rows.jsonl", scale), console=quiet())
    assert figures["win_rate"] == pytest.approx(100 * (1 + 0 + 0.25 + 0.5 + 0.5) / 5)


@pytest.mark.parametrize("own", [True, False])
def test_difficulties_come_from_the_rows_or_by_index(tmp_path, own):
    y, length, difficulty, baseline, model = invented(40)
    order = np.random.default_rng(2).permutation(40)
    rows = [
        {"winner": "model" if y[i] else "baseline", "len_1": int(baseline[i]), "len_2": int(model[i])}
        | ({"instruction_difficulty": float(difficulty[i])} if own else {"index": int(i)})
        for i in order
    ]
    scaled, labels = np.linspace(-2, 2, 40), np.linspace(0.9, 0.1, 40)
    table = write_gamed(tmp_path / "gamed.csv", scaled, 0 * difficulty if own else difficulty, labels, range(40))
    found = evaluate_winrate(write(tmp_path / "rows.jsonl", rows), controlled=True, gamed=table, console=quiet())[
        "length_controlled"
    ]
    gamed = Gamed(np.tanh(scaled), 0 * difficulty if own else difficulty, labels)
    expected = length_controlled(y[order], length[order], difficulty[order], gamed=gamed)
    assert found["win_rate"] == pytest.approx(expected.win_rate) and found["c"] == expected.c
    assert list(found["weights"].values()) == pytest.approx(list(expected.weights))


GOOD = {"preference": 2, "len_1": 3, "len_2": 4}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "row 2, field preference: missing; write 1"),
        ({"preference": 0.7}, "row 2, field preference: 0.7; write 1"),
        ({"preference": True}, "row 2, field preference: True"),
        ({"winner": "me"}, "row 2, field winner: 'me'; write baseline, tie, model, or null"),
        ({"winner": ["model"]}, r"row 2, field winner: \['model'\]"),
        ({"preference": 1}, "row 2: no lengths to control for; give `output_1`"),
        (GOOD | {"len_1": "many"}, "row 2, field len_1: 'many' is no number"),
        (GOOD | {"generator_2": "b"}, "row 2, field generator_2: 'b' after 'model'; give the annotations of one model"),
        (GOOD | {"instruction_difficulty": 1}, "row 1: its instruction's difficulty is not known; give every row"),
        (GOOD | {"index": -1}, "row 2, field index: -1 is no place"),
        ([1], "row 2: not a JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=f"rows.jsonl, {message}"):
        evaluate_winrate(write(tmp_path / "rows.jsonl", [GOOD, row]), controlled=True, console=quiet())


def test_other_mistakes(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD, GOOD])
    with pytest.raises(UserError, match="add --length-controlled"):
        evaluate_winrate(path, gamed="df_gamed.csv", console=quiet())
    with pytest.raises(UserError, match=r"nowhere.csv: cannot be read .*give AlpacaEval's df_gamed.csv"):
        evaluate_winrate(path, controlled=True, gamed=str(tmp_path / "nowhere.csv"), console=quiet())
    table = write_gamed(tmp_path / "g.csv", [0.1, 0.2, 0.3], [0, 0, 0], [1, 0, 0.5], [0, 1, 2])
    with pytest.raises(UserError, match="row 1: its instruction's difficulty is not known"):
        evaluate_winrate(path, controlled=True, gamed=table, console=quiet())
    table = write_gamed(tmp_path / "g.csv", [0.1, 0.2], [0, 0], [1, 1.5], [0, 1])
    with pytest.raises(UserError, match=r"g.csv, row 2, field preference: 1.5; write 0"):
        evaluate_winrate(path, controlled=True, gamed=table, console=quiet())
    with pytest.raises(UserError, match="no row has a preference"):
        evaluate_winrate(write(tmp_path / "rows.jsonl", [{"preference": None}]), console=quiet())
