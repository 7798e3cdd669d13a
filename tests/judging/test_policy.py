"""`align evaluate policy`, from prompts to figures."""

import json
import math
import re
from statistics import fmean

import numpy as np
import pytest
from openai_stub import answers, serving, spoken

from align.errors import UserError
from align.evaluate.winrate import length_controlled, length_feature
from align.judging.cases import Case
from align.judging.command import evaluate_policy
from align.judging.figures import judge_figures, label_figures
from align.judging.intervals import interval
from align.judging.judges import Judge, Opinion
from align.rollout.journal import read_lines

W3 = "{name: regex, pattern: w3}"
OPTIONS = {"samples": 3, "max_tokens": 6, "limit": 12}


@pytest.fixture
def models(tmp_path, save_llama) -> list[str]:
    return [str(save_llama(tmp_path / name, seed=seed)) for name, seed in (("one", 1), ("two", 2), ("three", 3))]


@pytest.fixture
def asked(models, rows_file, tmp_path):
    """What the command is called with: one model against another, by a rule."""
    cache = str(tmp_path / "cache")
    return {
        "models": models[:1],
        "against": models[1],
        "prompts": str(rows_file),
        "judges": [W3],
        "cache": cache,
    } | OPTIONS


def sampled(folder) -> list[dict]:
    """What each side wrote, by the prompt's id."""
    files = sorted((folder / "samples").glob("*/sampled.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    return [{line["id"]: line for line in read_lines(file)} for file in files]


def test_the_win_rate_is_of_the_samples_on_disk(asked, tmp_path):
    found = evaluate_policy(**asked, output=str(tmp_path / "out"))
    own, other = sampled(tmp_path / "out")
    wins = [
        [float("w3" in a) + 0.5 * (("w3" in a) == ("w3" in b)) - float("w3" in a and "w3" in b) * 0 for a, b in pairs]
        for pairs in (zip(own[name]["completions"], other[name]["completions"], strict=True) for name in own)
    ]
    labels = [[min(value, 1.0) if value != 1.5 else 0.5 for value in prompt] for prompt in wins]
    assert found["win_rate"]["mean"] == pytest.approx(fmean(map(fmean, labels)))
    assert (found["prompts"], found["comparisons"], found["samples"]) == (12, 36, 3)
    assert found["length"] == fmean(len(text) for line in own.values() for text in line["completions"])
    assert found["position_bias"] is found["kl"] is found["ranking"] is None
    assert found == json.loads((tmp_path / "out/evaluate.json").read_text())
    assert found["labels"]["pairs"] > 12 and found["labels"]["accuracy"]["mean"] > 0.6, "more of w3 is better"


def test_the_two_sides_are_swapped_figures_and_all(asked, models, tmp_path):
    one = evaluate_policy(**asked, output=str(tmp_path / "one"))
    other = evaluate_policy(**asked | {"models": models[1:2], "against": models[0]}, output=str(tmp_path / "other"))
    assert one["win_rate"]["mean"] == pytest.approx(1 - other["win_rate"]["mean"])
    assert one["win_rate"]["mean"] != 0.5
    assert one["reward_change"]["mean"] == pytest.approx(-other["reward_change"]["mean"])
    assert (one["distinct_2"], one["length"]) == (other["distinct_2_against"], other["length_against"])


def biased(question: str, *, bias: float = 1.5) -> dict:
    """A judge that counts w3 and likes what it sees first."""
    first, second = answers(question)
    p = 1 / (1 + math.exp(-(first.count("w3") - second.count("w3") + bias)))
    return spoken(["A"], {"A": p, "B": 1 - p})


def test_a_planted_bias_for_the_first_answer_is_found_and_cancels(asked, tmp_path):
    with serving(biased) as (url, bodies):
        spec = f"{{name: served_judge, url: '{url}', model: m, mode: pairwise}}"
        found = evaluate_policy(**asked | {"judges": [spec]}, output=str(tmp_path / "out"))
        count = len(bodies)
        again = evaluate_policy(**asked | {"judges": [spec]}, output=str(tmp_path / "again"))
        assert len(bodies) == count, "the cache holds every verdict"
    assert found["position_bias"]["low"] > 0.1
    assert found["position_flips"] > 0.3
    assert (found["win_rate"], found["ties"]) == (again["win_rate"], again["ties"])
    own, other = sampled(tmp_path / "out")
    labels, biases = [], []
    for name in own:
        pairs = zip(own[name]["completions"], other[name]["completions"], strict=True)
        gaps = [(a.count("w3") - b.count("w3"), a == b) for a, b in pairs]
        both = [[1 / (1 + math.exp(-(gap + sign * 1.5))) for sign in (1, -1)] for gap, same in gaps]
        labels.append(fmean(0.5 if same else fmean(p) for p, (_, same) in zip(both, gaps, strict=True)))
        if known := [(p[0] - p[1]) / 2 for p, (_, same) in zip(both, gaps, strict=True) if not same]:
            biases.append(fmean(known))
    assert found["win_rate"]["mean"] == pytest.approx(fmean(labels), abs=1e-6)
    assert found["position_bias"]["mean"] == pytest.approx(fmean(biases), abs=1e-6)
    assert found["reward"] is None and found["best_of_n"] is None


def test_a_judge_without_bias_has_none(asked, tmp_path):
    with serving(lambda question: biased(question, bias=0.0)) as (url, _):
        spec = f"{{name: served_judge, url: '{url}', model: m, mode: pairwise}}"
        found = evaluate_policy(**asked | {"judges": [spec, W3]}, output=str(tmp_path / "out"))
    assert found["position_bias"]["low"] <= 1e-9 and found["position_bias"]["high"] >= -1e-9
    assert found["position_flips"] == 0
    assert [own["name"] for own in found["judges"]] == ["served_judge m pairwise", "regex"]
    (both,) = found["agreement"]
    assert both["judges"] == [spec, W3] and both["kappa"] > 0.3, "one counts w3, the other looks for one"


def test_verdicts_that_are_none_are_left_out_and_counted(asked, tmp_path):
    def mute(question):
        first, second = answers(question)
        return spoken(["hm"]) if "w5" in first + second else spoken(["B"])

    with serving(mute) as (url, _):
        spec = f"{{name: served_judge, url: '{url}', model: m, mode: pairwise}}"
        found = evaluate_policy(**asked | {"judges": [spec]}, output=str(tmp_path / "out"))
    assert found["without_a_verdict"] > 0 and found["comparisons"] + found["without_a_verdict"] == 36
    assert found["win_rate"]["mean"] == 0.5 and found["ties"] == 1, "B in both orders is a tie"
    with serving(lambda question: spoken(["hm"])) as (url, _):
        spec = f"{{name: served_judge, url: '{url}', model: m, mode: pairwise}}"
        with pytest.raises(UserError, match="gave no verdict at all"):
            evaluate_policy(**asked | {"judges": [spec]}, output=str(tmp_path / "mute"))


class Kill(BaseException):
    pass


@pytest.mark.parametrize("use_cache", [True, False])
def test_killed_among_samples_and_opinions_it_ends_with_the_same_files(asked, tmp_path, monkeypatch, use_cache):
    from align.judging import judges
    from align.rollout.journal import Journal

    monkeypatch.setattr(judges, "AT_ONCE", 5)
    asked |= {"use_cache": use_cache}
    whole = tmp_path / "whole"
    evaluate_policy(**asked | {"cache": str(tmp_path / "other")}, output=str(whole))
    append, left = Journal.append, 0

    def dies(self, lines):
        nonlocal left
        append(self, lines)
        left -= 1
        if not left:
            with self.partial.open("a") as file:
                file.write('{"id": "torn')
            raise Kill

    monkeypatch.setattr(Journal, "append", dies)
    kills = 0
    for after in (4, 14, 7, 1, 1, 0):  # among the first side's samples, the second's, and the judge's blocks
        left = after
        try:
            evaluate_policy(**asked, output=str(tmp_path / "killed"))
        except Kill:
            kills += 1
    assert kills == 5
    files = [file.relative_to(whole) for file in whole.rglob("*.json*") if file.is_file()]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "killed" / file).read_bytes() == (whole / file).read_bytes()


def test_three_sides_are_ranked(asked, models, tmp_path):
    found = evaluate_policy(**asked | {"models": [models[0], models[2]]}, output=str(tmp_path / "out"))
    assert {row["model"] for row in found["ranking"]} == set(models)
    elos = [row["elo"] for row in found["ranking"]]
    assert elos == sorted(elos, reverse=True) and fmean(elos) == pytest.approx(1000)
    two = evaluate_policy(**asked, output=str(tmp_path / "out"))
    assert found["win_rate"] == two["win_rate"] and two["ranking"] is None


def test_the_rows_own_completions_are_a_side(asked, tmp_path, rows_file):
    found = evaluate_policy(**asked | {"against": "rows"}, output=str(tmp_path / "out"))
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()][:12]
    assert found["comparisons"] == sum(max(3, len(row["completions"])) for row in rows)
    assert found["length_against"] == pytest.approx(fmean(len(t) for row in rows for t in row["completions"]))
    assert found["ended_against"] is None


def test_a_prompt_file_without_completions_has_no_labels(asked, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w3 w{k}"}) + "\n" for k in range(10, 16)))
    found = evaluate_policy(**asked | {"prompts": str(prompts)}, output=str(tmp_path / "out"))
    assert found["labels"] is None and found["prompts"] == 6
    with pytest.raises(UserError, match="prompts.jsonl"):
        evaluate_policy(**asked | {"prompts": str(prompts), "against": "rows"}, output=str(tmp_path / "rows"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"against": "before"}, "no run, so nothing is known of what it was before"),
        ({"temperature": 0.0}, "--samples 1"),
        ({"judges": ["{name: nobody}"]}, "nobody"),
        ({"output": None}, "give --output FOLDER"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_sampled(asked, tmp_path, changes, message):
    given = {"output": str(tmp_path / "out")} | asked | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_policy(**given)
    assert not list(tmp_path.glob("out/samples/*"))
    with pytest.raises(UserError, match="named twice"):
        evaluate_policy(**{**asked, "against": asked["models"][0], "output": str(tmp_path / "out")})


def case(texts: list[str], labels=()) -> Case:
    from align.data.schema import Row

    row = Row("r", "p", tuple(texts), None, None, {}, "file", 1)
    return Case(row, {"a": [0], "b": [1]}, {("a", "b"): [(0, 1)]}, list(labels))


def test_a_win_in_one_order_alone_is_a_tie():
    orders = [(0.9, 0.8), (0.9, 0.2), (0.4, 0.3), (0.9, None)]
    said = [Opinion(None, {(0, 1): own}) for own in orders]
    found = judge_figures([case(["x", "yy"])] * 4, said, ("a", "b"), seed=0)
    assert (found["wins"], found["ties"], found["losses"]) == (1 / 3, 1 / 3, 1 / 3)
    assert found["win_rate"]["mean"] == pytest.approx((0.85 + 0.55 + 0.35) / 3)
    assert found["position_bias"]["mean"] == pytest.approx((0.05 + 0.35 + 0.05) / 3)
    assert found["position_flips"] == 1 / 3
    assert found["without_a_verdict"] == 1


def test_labels_are_measured_by_hand():
    """Rewards 2 and 0, 1 and 1, 0 and 1 of pairs whose first is better."""
    said = [Opinion(list(own), {}) for own in ((2.0, 0.0), (1.0, 1.0), (0.0, 1.0))]
    found = label_figures([case(["xxx", "y"], [(0, 1)])] * 3, said, seed=0)
    p = [1 / (1 + math.exp(-d)) for d in (2.0, 0.0, -1.0)]
    assert found["accuracy"]["mean"] == pytest.approx(0.5)
    assert found["brier"] == pytest.approx(fmean((1 - own) ** 2 for own in p))
    bins = [(0.5, 0.5), (p[0], 1.0), (1 - p[2], 0.0)]  # confidence, share right: each in a bin of its own
    assert found["calibration_error"] == pytest.approx(fmean(abs(sure - right) for sure, right in bins))
    assert (found["pairs"], found["longer_wins"]) == (3, 1.0)


def test_the_length_controlled_error_is_clustered():
    """Every row twice, as one instruction of two: nothing more is known than from each once."""
    generator = np.random.default_rng(0)
    labels, own, other = generator.random(60), generator.integers(10, 90, 60), generator.integers(10, 90, 60)
    once = length_controlled(labels, length_feature(other, own), c=1e4)
    twice = length_controlled(
        np.repeat(labels, 2), np.repeat(length_feature(other, own), 2), c=1e4, clusters=np.repeat(np.arange(60), 2)
    )
    assert twice.win_rate == pytest.approx(once.win_rate, abs=1e-3)
    assert twice.standard_error == pytest.approx(once.standard_error, rel=1e-3)
    apart = length_controlled(np.repeat(labels, 2), np.repeat(length_feature(other, own), 2), c=1e4)
    assert apart.standard_error < 0.75 * once.standard_error


def test_an_interval_takes_the_comparisons_of_a_prompt_together():
    """Four samples of a prompt that always say the same are no more than one."""
    outcomes = np.random.default_rng(0).random(50) < 0.6
    assert interval(outcomes.astype(float), seed=0).standard_error == pytest.approx(
        np.std(outcomes, ddof=1) / math.sqrt(50)
    )
    said = [Opinion([1.0, 0.0] if won else [0.0, 1.0], {}) for won in outcomes]
    four = [Case(own.row, own.sides, {("a", "b"): [(0, 1)] * 4}, []) for own in [case(["x", "y"])] * 50]
    one = judge_figures([case(["x", "y"])] * 50, said, ("a", "b"), seed=0)
    assert judge_figures(four, said, ("a", "b"), seed=0)["win_rate"] == one["win_rate"]


def test_a_judge_of_pairs_has_no_transforms(tmp_path):
    judge = "{name: served_judge, url: 'http://localhost:1/v1', model: m, mode: pairwise}"
    with pytest.raises(UserError, match="no rewards to transform"):
        Judge(f"{{scorer: {judge}, transforms: [{{name: clip, low: 0}}]}}", tmp_path, None, allow_code=False)
