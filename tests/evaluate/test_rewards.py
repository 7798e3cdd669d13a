"""`align evaluate rewards`: rows in, figures out."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from align.cli import main
from align.errors import UserError
from align.evaluate.rewards import evaluate_rewards
from align.scoring import score_rows

FIVE = ("llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "llmbar-adver-manual")


class ByLength:
    """A scorer that likes long completions."""

    def score(self, prompts, completions):
        assert len(prompts) == len(completions)
        return [float(len(text)) for text in completions]


@pytest.fixture
def by_length(monkeypatch):
    monkeypatch.setattr("align.evaluate.rewards.load_scorer", lambda spec: ByLength())
    monkeypatch.setattr("align.evaluate.rewards.reads_text_without_template", lambda spec: False)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def quiet() -> Console:
    return Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115


def test_llmbar_gives_the_five_subsets_and_the_length_baseline(shared_data, by_length):
    """Its README says how often the longer answer is right, in percent of each subset."""
    path = str(shared_data / "llmbar_rm_bench" / "pairs.jsonl.gz")
    found = evaluate_rewards(path, reward="length", benchmark="rewardbench", console=quiet())
    baseline = dict(zip(FIVE, (56.0, 11.9, 13.0, 44.7, 17.4), strict=True))
    counts = dict(zip(FIVE, (100, 134, 92, 47, 46), strict=True))
    for name in FIVE:
        group = found["groups"][name]
        assert group["lists"] == counts[name] and round(100 * group["accuracy"], 1) == baseline[name]
    weighted = sum(counts[n] * found["groups"][n]["accuracy"] for n in FIVE) / sum(counts.values())
    assert found["sections"] == {"Chat Hard": pytest.approx(weighted)}
    assert found["off_topic"]["accuracy"] == 0.0 and found["off_topic"]["pairs"] > 800


def test_the_rows_own_rewards_are_measured(tmp_path, capsys):
    rows = [
        {"prompt": "p", "chosen": "good", "rejected": "bad", "rewards": [1.0, 0.0], "subset": "a"},
        {"prompt": "p", "chosen": "good", "rejected": "bad", "rewards": [0.5, 0.5], "subset": "a"},
        {"prompt": "p", "completions": ["x", "y", "z"], "grades": [2, 1, 0], "rewards": [1, 3, 2], "subset": "b"},
        {"prompt": "p", "completions": ["x", "y"], "grades": [1, 1], "rewards": [1, 3]},
    ]  # fmt: skip
    main(["evaluate", "rewards", write(tmp_path / "rows.jsonl", rows), "--json", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["rows"] == {"read": 4, "judged": 3, "without_an_order": 1}
    assert figures["groups"]["a"]["accuracy"] == 0.75 and figures["groups"]["b"]["accuracy"] == pytest.approx(1 / 3)
    assert figures["overall"]["accuracy"] == pytest.approx((1 + 0.5 + 1 / 3) / 3)
    assert figures["groups"]["b"]["reciprocal_rank"] == pytest.approx(1 / 3)
    printed = capsys.readouterr().out
    assert "0.7500" in printed and "reliability" in printed and "calibration error" in printed
    strict = evaluate_rewards(str(tmp_path / "rows.jsonl"), ties="wrong", console=quiet())
    assert strict["groups"]["a"]["accuracy"] == 0.5 and strict["groups"]["a"]["best_of_n"] == 0.5


def test_what_align_score_wrote_is_measured_by_the_grades_that_were_given(tmp_path):
    rows = [{"prompt": "p", "completions": ["a", "bb", "ccc"], "grades": [2.0, 0.0, 1.0]}]
    scored = str(tmp_path / "scored.jsonl")
    main(["score", "--reward", "{name: length, max: 2}", "--no-cache", write(tmp_path / "rows.jsonl", rows), scored])
    found = evaluate_rewards(scored, console=quiet())
    assert found["overall"]["accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)  # rewards 1, 1, and less


def test_a_mapping_and_a_condition_choose_what_is_measured(tmp_path):
    rows = [{"q": "p", "good": "a", "bad": "bb", "rewards": [1, 0][::step], "n": step} for step in (1, -1)]
    path = write(tmp_path / "rows.jsonl", rows)
    columns = ["prompt=q", "chosen=good", "rejected=bad"]
    for where, accuracy in (("n == 1", 1), ("n == -1", 0), (None, 0.5)):
        found = evaluate_rewards(path, columns=columns, where=where, console=quiet())
        assert found["overall"]["accuracy"] == accuracy


def test_a_weight_of_a_row_is_refused_since_every_row_counts_once(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "bb", "rewards": [1, 0], **own} for own in ({}, {"weight": 2})]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"row 2, field weight: 2, and here every row counts once; .*--ignore weight"):
        evaluate_rewards(path, console=quiet())
    assert evaluate_rewards(path, ignore=["weight"], console=quiet())["overall"]["accuracy"] == 1


LISTS = [
    {"prompt": "p", "completions": ["1", "22", "333"], "grades": [2, 1, 0], "answer": "1"},
    {"prompt": "q", "completions": ["4444", "55555"], "grades": [0, 1], "answer": "55555"},
]


def reward_of(spec: dict, tmp_path: Path, form: str) -> str:
    if form == "text":
        return json.dumps(spec)
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(spec))
    return str(tmp_path / "reward.yaml")


@pytest.mark.parametrize("form", ["text", "file"])
def test_a_reward_is_what_align_score_reads(tmp_path, monkeypatch, form):
    """Weight and transforms count: the mean margin is that of rewards that were weighted after their transforms."""
    (tmp_path / "own_lengths.py").write_text("def characters(prompt, completion): return len(completion)")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "rows.jsonl", LISTS)
    spec = {
        "scorer": {"name": "python", "function": "own_lengths:characters"},
        "weight": -2.0,
        "transforms": [{"name": "standardize", "per": "dataset"}, {"name": "clip", "high": 1.0}],
    }
    found = evaluate_rewards(path, reward=reward_of(spec, tmp_path, form), console=quiet())
    out = tmp_path / "scored.jsonl"
    score_rows(path, str(out), rewards=[reward_of(spec, tmp_path, form)], use_cache=False, console=quiet())
    scored = [json.loads(line)["rewards"] for line in out.read_text().splitlines()]
    std = 2**0.5  # of the lengths 1 to 5, whose mean is 3
    by_hand = [[-2 * min((n - 3) / std, 1.0) for n in own] for own in ((1, 2, 3), (4, 5))]
    for own, other in zip(scored, by_hand, strict=True):
        assert own == pytest.approx(other)
    margins = [a - b for r in by_hand[:1] for a, b in ((r[0], r[1]), (r[0], r[2]), (r[1], r[2]))]
    assert found["overall"]["accuracy"] == pytest.approx((1 + (by_hand[1][1] > by_hand[1][0])) / 2)
    assert found["overall"]["margin"] == pytest.approx((sum(margins) / 3 + by_hand[1][1] - by_hand[1][0]) / 2)


def test_a_scorer_that_compares_with_an_answer(tmp_path):
    found = evaluate_rewards(write(tmp_path / "r.jsonl", LISTS), reward="{name: answer}", console=quiet())
    assert found["overall"]["best_of_n"] == 1.0
    with pytest.raises(UserError, match="row 1, field solution: no reference answer; give text"):
        evaluate_rewards(
            write(tmp_path / "r.jsonl", LISTS), reward="{name: answer, answer_column: solution}", console=quiet()
        )


def test_rewardbench2_and_its_ties(tmp_path):
    rng = random.Random(4)
    rows = [{"id": f"m{i}", "prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math",
             "rewards": [rng.randrange(3) for _ in range(4)]} for i in range(20)]  # fmt: skip
    rows += [
        {"id": "ref:1", "prompt": "p", "chosen": ["a"], "rejected": ["b"], "subset": "Ties", "rewards": [3, 0]},
        {
            "id": "tied:1",
            "prompt": "p",
            "chosen": ["a", "b"],
            "rejected": ["c"],
            "subset": "Ties",
            "rewards": [3, 2, 0],
        },
    ]
    found = evaluate_rewards(write(tmp_path / "r.jsonl", rows), benchmark="rewardbench2", console=quiet())
    best = [(r["rewards"][0] == max(r["rewards"])) / r["rewards"].count(max(r["rewards"])) for r in rows[:20]]
    import math

    ties = 0.3 + 0.3 + 0.2 * (2 > 1) + 0.2 * (2 > 1) + 0.01 * math.tanh(2 / 1 - 1)
    assert found["rewardbench2"]["Math"] == pytest.approx(sum(best) / 20)
    assert found["rewardbench2"]["Ties"] == pytest.approx(ties)
    assert found["rewardbench2"]["overall"] == pytest.approx((sum(best) / 20 + ties) / 2)
    rows[-1]["id"] = "x"
    with pytest.raises(UserError, match="row 22: id x"):
        evaluate_rewards(write(tmp_path / "r.jsonl", rows), benchmark="rewardbench2", console=quiet())


def test_rm_bench(tmp_path):
    rows = [
        {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": d, "rewards": r}
        for d, r in (("chat", [1, 2, 3, 0, 1, 2]), ("code", [0, 0, 0, 1, 1, 1]))
    ]
    found = evaluate_rewards(write(tmp_path / "r.jsonl", rows), benchmark="rm-bench", console=quiet())["rm-bench"]
    chat = found["domains"]["chat"]
    assert (chat["hard"], chat["normal"], chat["easy"]) == (0.0, 1.0, 1.0) and found["domains"]["code"]["average"] == 0
    assert found["overall"] == pytest.approx(1 / 3)
    rows[0]["rejected"] = ["d"]
    rows[0]["rewards"] = [1, 2, 3, 0]
    with pytest.raises(UserError, match="row 1: not 3 chosen"):
        evaluate_rewards(write(tmp_path / "r.jsonl", rows), benchmark="rm-bench", console=quiet())


def test_rm_bench_pools_as_its_authors_do(tmp_path):
    """A second implementation: rows by the beginning of their domain, then plain means; refusals and responses pool."""
    sizes = {"chat": 3, "math": 4, "code": 2, "safety-refuse": 5, "safety-response": 2}
    rng = np.random.default_rng(4)
    rewards = {name: rng.integers(0, 4, (n, 6)).astype(float) for name, n in sizes.items()}
    rows = [
        {"prompt": f"{d} {i}", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": d, "rewards": list(r)}
        for d, own in rewards.items()
        for i, r in enumerate(own)
    ]
    found = evaluate_rewards(write(tmp_path / "r.jsonl", rows), benchmark="rm-bench", console=quiet())["rm-bench"]
    pooled = {}
    for domain in ("chat", "math", "code", "safety"):
        own = np.concatenate([r for name, r in rewards.items() if name.startswith(domain)])
        wins = {
            kind: [own[:, i] > own[:, 3 + j] for i in range(3) for j in range(3) if (i < j, i == j, i > j)[k]]
            for k, kind in enumerate(("hard", "normal", "easy"))
        }
        pooled[domain] = {kind: np.mean(won) for kind, won in wins.items()}
    assert {d: {k: f[k] for k in ("hard", "normal", "easy")} for d, f in found["domains"].items()} == {
        d: pytest.approx(f) for d, f in pooled.items()
    }
    for kind in ("hard", "normal", "easy"):
        assert found[kind] == pytest.approx(np.mean([f[kind] for f in pooled.values()]))
    assert found["overall"] == pytest.approx(np.mean([list(f.values()) for f in pooled.values()]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "row 1: no `rewards`"),
        ({"prompt": "p", "completions": ["a", "b"], "rewards": [1, 2]}, "row 1: no grades"),
        ({"prompt": "p", "completions": ["a", "b"], "grades": [1, 1], "rewards": [1, 2]}, "nothing to judge"),
    ],
)
def test_rows_that_cannot_be_judged(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        evaluate_rewards(write(tmp_path / "r.jsonl", [row]), console=quiet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "topic"}, "r.jsonl: no row has the column topic to group by; give --by a column"),
        ({"benchmark": "rewardbench"}, "r.jsonl: no row's subset is one of RewardBench's; leave --benchmark out"),
    ],
)
def test_groups_that_no_row_is_of(tmp_path, options, message):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "rewards": [1, 0], "subset": "mine"}
    with pytest.raises(UserError, match=message):
        evaluate_rewards(write(tmp_path / "r.jsonl", [row]), console=quiet(), **options)


@pytest.fixture
def chat_model(tmp_path):
    from tiny_models import TEMPLATE, letters, llama, saved
    from transformers import LlamaForSequenceClassification

    return saved(tmp_path / "rm", LlamaForSequenceClassification(llama(pad_token_id=0)), letters(template=TEMPLATE))


def as_conversation(row: dict) -> dict:
    sides = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {**row, **sides, "prompt": [{"role": "user", "content": row["prompt"]}]}


@pytest.mark.parametrize("benchmark", [None, "rewardbench"])
def test_text_rows_of_a_benchmark_get_the_reward_models_template_and_others_are_said_to_have_none(
    benchmark, tmp_path, chat_model
):
    texts = [
        {"prompt": p, "chosen": c, "rejected": r, "subset": "alpacaeval-easy"}
        for p, c, r in (("a b", "c d e", "f"), ("g h", "i", "j k"), ("l", "m n", "o p q"))
    ]
    spec = f"{{name: sequence_classifier, model: {chat_model}}}"
    found, console = {}, quiet()
    for name, rows in (("text", texts), ("chat", [as_conversation(row) for row in texts])):
        path = write(tmp_path / f"{name}.jsonl", rows)
        found[name] = evaluate_rewards(path, reward=spec, benchmark=benchmark, console=console)
    assert (found["text"]["overall"]["margin"] == found["chat"]["overall"]["margin"]) == (benchmark is not None)
    assert found["chat"]["text_rows"] == {"without_template": 0, "as_messages": 0}
    said = console.export_text()
    assert ("3 text rows scored without the model's chat template" in said) == (benchmark is None)
    assert ("3 text rows put into the model's chat template, as RewardBench does" in said) == (benchmark is not None)


def test_text_beside_conversations_is_refused_where_a_template_would_write_the_ones_alone(tmp_path, chat_model):
    row = {"prompt": "a b", "chosen": "c d e", "rejected": "f", "subset": "alpacaeval-easy"}
    path = write(tmp_path / "rows.jsonl", [row, as_conversation(row)])
    with pytest.raises(UserError, match=r"row 1: the prompt is text, .* and that of .*row 2 is a conversation"):
        evaluate_rewards(path, reward=chat_model)
    evaluate_rewards(path, reward=chat_model, benchmark="rewardbench", console=quiet())
    evaluate_rewards(path, reward="{name: length, max: 3}", console=quiet())


def test_rag_rewardbench_is_plain_means_over_scenarios(tmp_path):
    shares = {
        "helpful": (3, 4), "multi-hop reasoning": (1, 2), "Fine-grained Citation": (1, 3),
        "harmless": (5, 5), "appropriate abstain": (0, 2), "conflict robustness": (2, 3),
    }  # fmt: skip
    rows = [
        {
            "prompt": f"p{name}{i}",
            "chosen": "a",
            "rejected": "b",
            "subset": name,
            "rewards": [1, 0] if i < hits else [0, 1],
        }
        for name, (hits, count) in shares.items()
        for i in range(count)
    ]
    options = {"benchmark": "rag-rewardbench", "console": quiet()}
    found = evaluate_rewards(write(tmp_path / "r.jsonl", rows), **options)["rag-rewardbench"]
    helpful, harmless = (3 / 4, 1 / 2, 1 / 3), (1, 0, 2 / 3)
    assert found["reason"] == 1 / 2 and found["abst"] == 0
    assert found["helpfulness"] == pytest.approx(sum(helpful) / 3)
    assert found["harmlessness"] == pytest.approx(sum(harmless) / 3)
    assert found["overall"] == pytest.approx(sum(helpful + harmless) / 6)
    part = evaluate_rewards(write(tmp_path / "r.jsonl", rows[:9]), **options)["rag-rewardbench"]
    assert "overall" not in part and "harmlessness" not in part and part["helpfulness"] == found["helpfulness"]
    with pytest.raises(UserError, match="row 1: subset chat; RAG-RewardBench's hold one of helpful, reason"):
        evaluate_rewards(write(tmp_path / "r.jsonl", [{**rows[0], "subset": "chat"}]), **options)


def test_buckets_are_fifths_of_the_rows_by_a_columns_numbers(tmp_path, capsys):
    """Eleven rows, so that values are at the edges; they go below, and equal difficulties stay together."""
    hard = [8, 1, 4, 2, 7, 3, 9, 1, 6, 5, 9]
    rows = [
        {"prompt": f"p{i}", "chosen": "a", "rejected": "b", "difficulty": own, "rewards": [float(own % 3), 1.0]}
        for i, own in enumerate(hard)
    ]
    path = write(tmp_path / "r.jsonl", rows)
    found = evaluate_rewards(path, buckets="difficulty")["buckets"]
    edges = np.quantile(hard, [0.2, 0.4, 0.6, 0.8])
    parts = [[h for h in hard if low < h <= high] for low, high in zip((0, *edges), (*edges, 99), strict=True)]
    assert [(own["low"], own["high"], own["lists"]) for own in found] == [(min(p), max(p), len(p)) for p in parts]
    worth = {0: 0.0, 1: 0.5, 2: 1.0}
    for own, part in zip(found, parts, strict=True):
        assert own["accuracy"] == pytest.approx(sum(worth[h % 3] for h in part) / len(part))
        assert own["margin"] == pytest.approx(sum(h % 3 - 1 for h in part) / len(part))
    assert "buckets" in capsys.readouterr().out
    assert "buckets" not in evaluate_rewards(path, console=quiet())
    flat = evaluate_rewards(
        write(tmp_path / "r.jsonl", [{**row, "difficulty": 2} for row in rows]), buckets="difficulty"
    )
    assert [own["lists"] for own in flat["buckets"]] == [11]
    for value in ("hard", None, True):
        with pytest.raises(UserError, match="row 11, field difficulty: no number for --buckets"):
            broken = [*rows[:-1], {**rows[-1], "difficulty": value}]
            evaluate_rewards(write(tmp_path / "r.jsonl", broken), buckets="difficulty", console=quiet())
