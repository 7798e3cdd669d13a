"""`align score` from files to files: what is scored, kept, combined, cached, refused and set aside."""

import gzip
import json
import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from tiny_models import bert, letters, llama, saved
from transformers import LlamaForSequenceClassification

from align.data.formats import read_row
from align.errors import UserError
from align.scoring import score_rows
from align.scoring.cache import ADDED, RewardCache
from rewards import ScorerError, load_scorer
from rewards.grading import grades_from_rewards

WORDS = {"name": "length", "min": 2}
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path) -> Write:
    def rows(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
        return str(path)

    return rows


@pytest.fixture
def score(tmp_path) -> Callable[..., list[dict]]:
    """Scores into a new file and gives its rows; no cache unless asked for."""
    runs = iter(range(100))

    def run(path: str, *rewards, name: str = "out.jsonl", **options) -> list[dict]:
        output = tmp_path / f"{next(runs)}-{name}"
        score_rows(path, str(output), rewards=rewards, **{"use_cache": False, **options})
        assert not output.with_name(output.name + ".parts").exists()
        if name.endswith(".parquet"):
            return pyarrow.parquet.read_table(output).to_pylist()
        text = gzip.decompress(output.read_bytes()).decode() if name.endswith(".gz") else output.read_text()
        return [json.loads(line) for line in text.splitlines()]

    return run


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    model = LlamaForSequenceClassification(llama(pad_token_id=2))
    return saved(tmp_path_factory.mktemp("classifier"), model, letters("</s>"))


def many(n: int = 40) -> list[dict]:
    """Rows of one to five completions of one to thirty letters."""
    generator = torch.Generator().manual_seed(0)

    def text(longest: int) -> str:
        size = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return " ".join("abcdefgh"[i] for i in torch.randint(0, 8, (size,), generator=generator))

    return [
        {"id": i, "prompt": text(12) + " ", "completions": [text(30) for _ in range(1 + i % 5)], "source": f"s{i % 3}"}
        for i in range(n)
    ]


def test_rewards_are_the_scorers_and_rows_keep_their_order_and_fields(write, score, classifier):
    rows = many()
    out = score(write(*rows), classifier, window=30, tokens_per_batch=200)
    scorer = load_scorer({"model": classifier, "exact": True})
    assert [row["id"] for row in out] == list(range(40))
    for row, given in zip(out, rows, strict=True):
        alone = [scorer.score([given["prompt"]], [own])[0] for own in given["completions"]]
        assert row["rewards"] == pytest.approx(alone, abs=1e-6)
        assert row["grades"] == grades_from_rewards(row["rewards"], "win_probability")
        assert {name: row[name] for name in given} == given
    assert score(write(*rows), classifier, exact=True)[7]["rewards"] == [
        scorer.score([rows[7]["prompt"]], [own])[0] for own in rows[7]["completions"]
    ]


def test_every_format_becomes_a_canonical_row_that_keeps_what_it_brought(write, score):
    rows = [
        {"prompt": "p", "chosen": "a b", "rejected": "c", "margin": 2.0, "weight": 0.5},
        {"prompt": "p", "completion": "a b", "label": False},
        {"prompt": "p", "responses": ["a", "b c"], "scores": [3, 4], "meta": {"subset": "x"}, "empty": None},
        {"id": "m", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    out = score(write(*rows), WORDS, grades="rank")
    assert out == [
        {"prompt": "p", "completions": ["a b", "c"], "given_grades": [1, 0], "margin": 2.0, "weight": 0.5}
        | {"rewards": [1, 0], "grades": [1, 0]},
        {"prompt": "p", "completions": ["a b"], "given_grades": [0], "rewards": [1], "grades": [0]},
        {"prompt": "p", "completions": ["a", "b c"], "given_rewards": [3, 4], "meta": {"subset": "x"}}
        | {"rewards": [0, 1], "grades": [0, 1]},
        {"id": "m", "prompt": [{"role": "user", "content": "q"}]}
        | {"completions": [[{"role": "assistant", "content": "a"}]], "rewards": [0], "grades": [0]},
    ]


def test_a_mapping_and_a_condition_choose_what_is_scored(write, score):
    rows = [{"q": "p", "good": "a b", "bad": "c", "lang": lang} for lang in ("en", "de", "en")]
    chosen = {"columns": ["prompt=q", "chosen=good", "rejected=bad"], "where": "lang == 'en'"}
    out = score(write(*rows), WORDS, **chosen)
    assert [(row["prompt"], row["completions"], row["rewards"], row["lang"]) for row in out] == [
        ("p", ["a b", "c"], [1, 0], "en")
    ] * 2
    with pytest.raises(UserError, match="--column q: no mapping; write `name=place`"):
        score(write(*rows), WORDS, columns=["q"])
    with pytest.raises(UserError, match="is no condition"):
        score(write(*rows), WORDS, where="lang =")


def test_lists_made_of_several_rows_keep_what_was_made_of_them(write, score):
    rated = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 2)
    tree = {"message_id": "m", "role": "prompter", "text": "q"}
    tree["replies"] = [{"message_id": "n", "role": "assistant", "text": "a b", "rank": 0, "replies": []}]
    rows = [
        {"prompt": "p", "response": "a", **rated},
        {"prompt": "p", "response": "b c", **rated},
        {"context": "q", "response1": "a", "response2": "b", "overall_preference": -2},
        {"message_tree_id": "m", "prompt": tree},
    ]
    steered, preferred, ranked = score(write(*rows), WORDS)
    answers = [[{"role": "assistant", "content": text}] for text in ("a", "b c")]
    assert (steered["completions"], steered["given_rewards"]) == (answers, [2, 2])
    assert steered["attributes"] == [rated, rated]
    assert (preferred["given_grades"], preferred["strength"]) == ([1, 0], 2)
    assert (ranked["id"], ranked["message_tree_id"], ranked["given_rewards"]) == ("m", "m", [0])


def test_what_is_ignored_or_read_from_another_column_stays_in_the_row(write, score):
    row = {
        "system": "Be kind.",
        "question": "q r",
        "items": [{"text": "a", "score": 1, "model": "m"}],
        "context": "x y",
    }
    with pytest.raises(UserError, match=r"field question: it looks like the prompt .* --ignore question"):
        score(write(row), WORDS)
    (out,) = score(write(row), WORDS, ignore=["context"])
    assert (out["prompt"], out["context"], out["items[].model"]) == ("Be kind.\n\nq r", "x y", ["m"])
    (out,) = score(write({"prompt": "p", "completion": "a", "chat_template_kwargs": {"deep": True}}), WORDS)
    assert out["chat_template_kwargs"] == {"deep": True}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_all_forms_of_input_and_output_hold_the_same(write, score, ending, tmp_path):
    rows = many(12)
    expected = score(write(*rows), WORDS)
    assert score(write(*rows, name="rows.jsonl.gz"), WORDS, name=f"out.{ending}", window=7) == expected
    again = tmp_path / f"1-out.{ending}"
    kept = score(str(again), {"name": "length", "max": 3})
    assert [row["given_rewards"] for row in kept] == [row["rewards"] for row in expected]


def test_parquet_says_when_a_column_has_two_kinds_of_values(write, score):
    path = write({"prompt": "p", "completion": "a", "x": 1}, {"prompt": "p", "completion": "a", "x": "b"})
    with pytest.raises(UserError, match="ends with .jsonl"):
        score(path, WORDS, name="out.parquet", window=1)


def test_several_rewards_are_transformed_combined_and_kept_apart(write, score):
    path = write({"prompt": "p", "completions": ["a", "a b c", "a b"]}, {"prompt": "q", "completions": ["a b"]})
    with pytest.raises(UserError, match=r"rows.jsonl, row 1: builtins:str: TypeError"):
        score(path, {"name": "python", "function": "builtins:str"})
    standard = {"scorer": WORDS, "weight": 2.0, "transforms": [{"name": "standardize", "per": "dataset"}]}
    out = score(path, standard, {"scorer": {"name": "length", "max": 2}, "part": "short"}, window=1)
    mean, std = 0.75, (3 * 0.25**2 + 0.75**2) ** 0.5 / 2  # of 0, 1, 1, 1
    high, low = (1 - mean) / std, (0 - mean) / std
    assert out[0]["rewards"] == pytest.approx([2 * low + 1, 2 * high + 0, 2 * high + 1])
    assert out[1]["rewards"] == pytest.approx([2 * high + 1])
    assert out[0]["reward_parts"] == {"length": [0, 1, 1], "short": [1, 0, 1]}
    short = {"name": "length", "max": 2}
    with pytest.raises(ScorerError, match="the transforms of length have to end with lsc"):
        score(path, WORDS, short, combination="and")
    half = [{"name": "lsc", "reference": "fixed", "value": 0.5}]
    parts = [{"scorer": scorer, "transforms": half} for scorer in (WORDS, short)]
    both = score(path, *parts, combination="and", grades="rank")
    assert both[0]["grades"] == [0.5, 0.5, 2], "good on both counts is best"


def test_lsc_is_held_against_the_reference_policys_rewards(write, score):
    """From a column or from scored rows; single completions stay in order."""
    rows = [{"prompt": "p", "completions": [text], "base": [0, 1, 1]} for text in ("a", "a b", "a b c")]
    path = write(*rows, {"prompt": "q", "completions": ["a", "a b"], "meta": {"base": [0, 0]}})
    sampled = write(
        {
            "prompt": "p",
            "completions": ["x", "x y"],
            "rewards": [0, 9],
            "reward_parts": {"length": [0, 1], "b": [7, 7]},
        },
        {"prompt": "p", "completions": ["z w"], "rewards": [1]},
        {"prompt": "q", "completions": ["x", "y"], "rewards": [0, 0]},
        name="base.jsonl",
    )
    for of in ({"column": "base"}, {"rows": sampled}):
        spec = {"scorer": WORDS, "transforms": [{"name": "lsc", "of": of, "reference": "mean"}]}
        out = [row["rewards"] for row in score(path, spec)]
        expected = [[-math.log1p(math.exp(mean - r)) for r in own] for mean, own in OF_WORDS]
        assert [r for own in out for r in own] == pytest.approx([r for own in expected for r in own], rel=1e-12)


OF_WORDS = [(2 / 3, [0]), (2 / 3, [1]), (2 / 3, [1]), (0, [0, 1])]
"""The mean of the reference policy's rewards, and the row's own."""
REFUSED = {
    "one completion, own": ({"name": "lsc", "of": "own"}, {}, "field completions: one completion"),
    "one completion, standardized": ({"name": "standardize"}, {}, "per: dataset"),
    "no column": ({"name": "lsc", "of": {"column": "base"}}, {}, "field base: no rewards of the reference policy"),
    "no numbers": ({"name": "lsc", "of": {"column": "base"}}, {"base": ["a"]}, "field base: no rewards"),
    "one sample": ({"name": "lsc", "of": {"column": "base"}}, {"base": [1.0]}, "too few for `normal_quantile`"),
    "no samples": ({"name": "lsc", "of": {"rows": "base.jsonl"}}, {}, "field prompt: lsc finds no samples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_a_transform_cannot_finish_are_refused_before_scoring(case, write, score, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step, more, message = REFUSED[case]
    write({"prompt": "other", "completions": ["x", "y"], "rewards": [0, 1]}, name="base.jsonl")
    path = write({"prompt": "p", "completions": ["a b"], **more})
    monkeypatch.setattr("align.scoring.window.score_window", None)
    with pytest.raises(UserError, match=message):
        score(path, {"scorer": WORDS, "transforms": [step]})


def test_reference_answers_come_from_a_column_or_meta(write, score):
    path = write(
        {"prompt": "p", "completions": ["4", "5"], "answer": 4},
        {"prompt": "p", "completions": ["4", "5"], "meta": {"answer": "5"}},
    )
    out = score(path, {"name": "answer", "kind": "numeric"})
    assert [row["rewards"] for row in out] == [[1, 0], [0, 1]]
    assert out[0]["answer"] == 4
    missing = write({"prompt": "p", "completions": ["4", "5"]})
    with pytest.raises(UserError, match="field answer: no reference answer"):
        score(missing, {"name": "answer"})


def test_a_rows_own_rules_come_from_its_column(write, score):
    row = {"prompt": "p", "completions": ["a b", "a"], "constraints": '[{"name": "length", "min": 2}]'}
    assert [own["rewards"] for own in score(write(row), {"name": "constraints"})] == [[1, 0]]
    bad = row | {"constraints": "[length]"}
    with pytest.raises(UserError, match=r"rows.jsonl, row 2: constraints: no JSON .*; give the JSON text of a list"):
        score(write(row, bad), {"name": "constraints"})


BAD_ROWS = {
    "not JSON": ("{", "not valid JSON"),
    "cut": ('{"prompt": "p", "comp', "not valid JSON"),
    "half a character": (r'{"prompt": "p", "completion": "\ud800"}', "half a character"),
    "a huge number": ('{"prompt": "p", "completion": "a", "x": ' + "9" * 5000 + "}", "not valid JSON"),
    "nested too deeply": ("[" * 100_000, "not valid JSON"),
    "a list": ([1], "not an object"),
    "text": ('"prompt"', "not an object"),
    "null": ("null", "not an object"),
    "no prompt": ({"completions": ["a"]}, "field prompt: missing"),
    "an empty prompt": ({"prompt": " ", "completions": ["a"]}, "field prompt: empty"),
    "no completions": ({"prompt": "p"}, "field completions: missing"),
    "empty completions": ({"prompt": "p", "completions": []}, "an empty list"),
    "one completion as text": ({"prompt": "p", "completions": "a"}, "field completions: text, not a list"),
    "a number among completions": ({"prompt": "p", "completions": ["a", 3]}, r"field completions\[1\]: a number"),
    "null among completions": ({"prompt": "p", "completions": ["a", None]}, r"field completions\[1\]: null"),
    "a prompt of the wrong kind": ({"prompt": {"a": 1}, "completions": ["a"]}, "field prompt: an object"),
    "a user's completion": (
        {"prompt": "p", "completions": [[{"role": "user", "content": "a"}]]},
        "messages of user",
    ),
    "an unknown role": ({"prompt": [{"role": "x", "content": "a"}], "completions": ["a"]}, "unknown role 'x'"),
    "scores of another length": ({"prompt": "p", "completions": ["a"], "scores": [1, 2]}, "2 entries for 1"),
    "a score that is no number": ({"prompt": "p", "completions": ["a"], "scores": ["x"]}, "not a number"),
    "an image": ({"prompt": "p", "completions": ["a"], "image": "x.png"}, "field image: "),
    "token ids": ({"prompt_ids": [1, 2], "completions_ids": [[3]]}, "field prompt_ids: token ids"),
    "unlike prompts": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        "prompt mismatch",
    ),
    "meta that is none": ({"prompt": "p", "completions": ["a"], "meta": 3}, "field meta: not an object"),
    "no chosen text": ({"prompt": "p", "rejected": "a"}, "chosen: missing"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_malformed_row_stops_or_is_set_aside(write, score, tmp_path, kind):
    bad, message = BAD_ROWS[kind]
    path = write({"id": 1, "prompt": "p", "completions": ["a"]}, bad, {"id": 3, "prompt": "p", "completions": ["a b"]})
    with pytest.raises(UserError, match=rf"rows.jsonl, row 2.*{message}"):
        score(path, WORDS)
    assert not list(tmp_path.glob("*.parts")), "refused before any work"
    out = score(path, WORDS, on_error="collect")
    assert [(row["id"], row["rewards"]) for row in out] == [(1, [0]), (3, [1])]
    (error,) = [json.loads(line) for line in (tmp_path / "1-out.jsonl.errors.jsonl").read_text().splitlines()]
    assert (error["source"], error["row"]) == (path, 2)
    assert error["raw"] == (bad if not isinstance(bad, str) or kind in TEXT_KEPT else json.loads(bad))
    summary = json.loads((tmp_path / "1-out.jsonl.summary.json").read_text())
    assert (summary["rows"], summary["errors"]) == (2, 1)


TEXT_KEPT = ("not JSON", "cut", "a huge number", "nested too deeply")
"""Kinds of rows that are no JSON, and are set aside as the text that they are."""


def test_a_row_that_a_scorer_cannot_take_is_found_among_others(write, score, classifier, tmp_path):
    chat = {"prompt": [{"role": "user", "content": "a"}], "completions": ["b"]}
    path = write({"prompt": "a ", "completions": ["b"]}, chat, {"prompt": "a ", "completions": ["c"]})
    with pytest.raises(UserError, match="rows.jsonl, row 2: .*no chat template.*--on-error collect"):
        score(path, classifier)
    out = score(path, classifier, on_error="collect")
    expected = load_scorer(classifier).score(["a ", "a "], ["b", "c"])
    assert [row["rewards"][0] for row in out] == pytest.approx(expected, abs=1e-6)
    assert "chat template" in (tmp_path / "1-out.jsonl.errors.jsonl").read_text()


def test_a_broken_scorer_is_no_rows_fault(write, score, monkeypatch):
    monkeypatch.setattr("rewards.served.TRIES", 1)
    served = {"name": "served", "url": "http://localhost:9", "model": "rm"}
    with pytest.raises(ScorerError, match="is the server running"):
        score(write(*many(3)), served, on_error="collect")


def counted(monkeypatch, tmp_path) -> list[str]:
    """A scorer whose calls can be counted."""
    calls: list[str] = []
    monkeypatch.setattr("rewards.rules._Rule.score", lambda self, p, c: calls.extend(c) or [float(len(t)) for t in c])
    return calls


def test_the_cache_answers_what_was_scored_before(write, score, tmp_path, monkeypatch):
    calls = counted(monkeypatch, tmp_path)
    cache = {"use_cache": True, "cache": tmp_path / "cache"}
    first = score(write(*many(6)), WORDS, **cache)
    scored = len(calls)
    more = many(8)
    again = score(write(*more), WORDS, **cache)
    assert again[:6] == first
    assert calls[scored:] == [own for row in more[6:] for own in row["completions"]]
    del calls[:]
    other_prompt = [{**row, "prompt": row["prompt"] + "x"} for row in more]
    score(write(*other_prompt), WORDS, **cache)
    score(write(*more), {**WORDS, "min": 3}, **cache)
    assert len(calls) == 2 * sum(len(row["completions"]) for row in more), "another prompt or scorer is another reward"


def test_a_cache_file_that_a_kill_left_empty_or_that_is_none(write, score, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "rewards.sqlite").touch()
    score(write(*many(2)), WORDS, use_cache=True, cache=tmp_path / "cache")
    (tmp_path / "cache" / "rewards.sqlite").write_text("no data base " * 100)
    with pytest.raises(UserError, match="remove the file"):
        score(write(*many(2)), WORDS, use_cache=True, cache=tmp_path / "cache")


@pytest.mark.parametrize("harm", ["reward + 1e-3", "NULL", "'words'"])
def test_a_damaged_reward_of_the_cache_is_said_and_computed_again(tmp_path, caplog, harm):
    cache = RewardCache(tmp_path)
    cache.add([(b"a", 1), (b"b", 0.5)])
    with closing(sqlite3.connect(cache.path)) as table, table:
        table.execute(f"UPDATE rewards SET reward = {harm} WHERE key = ?", (b"b",))
        table.execute("INSERT INTO rewards (key, reward) VALUES (?, ?)", (b"old", 2.0))  # by a version without digests
    assert cache.read([b"a", b"b", b"old"], cache.state()) == {b"a": 1.0, b"old": 2.0}
    assert f"{cache.path}: 1 damaged rewards are computed again" in caplog.text
    cache.add([(b"b", 0.5)])
    assert cache.read([b"b"], cache.state()) == {b"b": 0.5}


def test_another_job_can_use_the_cache_while_one_adds_to_it(tmp_path):
    rewards, state = RewardCache(tmp_path), 0

    def many():
        nonlocal state
        for i in range(2 * ADDED):
            if i == ADDED + 1:
                with closing(sqlite3.connect(rewards.path, timeout=0)) as other, other:
                    other.execute("INSERT INTO rewards (key, reward) VALUES (?, ?)", (b"other", 0.5))
                state = rewards.state()
            yield i.to_bytes(4), float(i)

    rewards.add(many())
    assert rewards.state() == 2 * ADDED + 1 and state == ADDED + 1
    assert rewards.read([b"other", (2 * ADDED - 1).to_bytes(4)], state) == {b"other": 0.5}


def test_truncated_texts_are_counted(write, score, classifier, tmp_path):
    rows = [{"prompt": "a b ", "completions": ["c", "c d e", "c d e f g"]}]  # with the start token 4, 6 and 8 tokens
    score(write(*rows), {"model": classifier, "max_length": 6})
    summary = json.loads((tmp_path / "0-out.jsonl.summary.json").read_text())
    assert (summary["scored"], summary["truncated"], summary["tokens"]) == (3, 1, 4 + 6 + 6)
    encoder = saved(tmp_path / "encoder", bert())
    score(write(*rows), {"name": "relevance", "model": encoder, "max_length": 4})
    summary = json.loads((tmp_path / "1-out.jsonl.summary.json").read_text())
    assert summary["truncated"] == 1, "3, 2, 4 and 6 tokens"


def test_equal_texts_are_scored_once(write, score, monkeypatch, tmp_path):
    calls = counted(monkeypatch, tmp_path)
    out = score(write(*[{"prompt": "p", "completions": ["a", "b", "a"]}] * 3), WORDS)
    assert calls == ["a", "b"]
    assert [row["rewards"] for row in out] == [[1, 1, 1]] * 3


@pytest.mark.parametrize(
    ("harmed", "old", "new"),
    [("out.jsonl", b'"s1"', b'"s3"'), ("out.jsonl.summary.json", b'"completions": 6', b'"completions": 7')],
)
def test_a_damaged_output_is_named_and_written_again_when_it_is_removed(write, tmp_path, harmed, old, new):
    path, output = write(*many(3)), tmp_path / "out.jsonl"
    run = partial(score_rows, path, str(output), rewards=[WORDS], use_cache=False)
    run()
    whole, file = output.read_bytes(), tmp_path / harmed
    run()
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))
    with pytest.raises(UserError, match=f"{harmed}: damaged, it is not as it was written; remove {output}"):
        run()
    output.unlink()
    run()
    assert output.read_bytes() == whole
    run()


def test_a_finished_output_is_left_alone_and_another_jobs_refused(write, score, tmp_path, monkeypatch, capsys):
    path, output = write(*many(5)), str(tmp_path / "out.jsonl")
    score_rows(path, output, rewards=[WORDS], use_cache=False)
    before = Path(output).stat().st_mtime_ns
    calls = counted(monkeypatch, tmp_path)
    score_rows(path, output, rewards=[WORDS], use_cache=False)
    assert Path(output).stat().st_mtime_ns == before and not calls
    with pytest.raises(UserError, match="is there already"):
        score_rows(path, output, rewards=[{**WORDS, "min": 4}], use_cache=False)
    with pytest.raises(UserError, match="outside it"):
        score_rows(str(tmp_path), str(tmp_path / "new.jsonl"), rewards=[WORDS])
    with pytest.raises(UserError, match="known endings"):
        score_rows(path, str(tmp_path / "out.csv"), rewards=[WORDS])
    with pytest.raises(UserError, match="known endings"):
        score_rows(path, ".", rewards=[WORDS])
    with pytest.raises(UserError, match="no folder"):
        score_rows(path, str(tmp_path / "absent" / "out.jsonl"), rewards=[WORDS])
    with pytest.raises(UserError, match="no rows"):
        score_rows(write(name="empty.jsonl"), str(tmp_path / "empty-out.jsonl"), rewards=[WORDS])


def test_a_job_that_failed_before_its_first_part_is_no_hindrance(write, tmp_path):
    path, output = write(*many(3)), tmp_path / "out.jsonl"
    with pytest.raises(ScorerError, match="absent"):
        score_rows(path, str(output), rewards=[str(tmp_path / "absent")], use_cache=False)
    score_rows(path, str(output), rewards=[WORDS], use_cache=False)
    assert len(output.read_text().splitlines()) == 3


def test_a_job_reads_the_cache_as_it_was_when_it_began(write, tmp_path, monkeypatch):
    """Otherwise what another job adds between a kill and the next start could change the output's last digits."""
    path, cache = write(*many(6)), tmp_path / "cache"
    value, calls = 1.0, 0

    def rewards(self, prompts, completions):
        nonlocal calls
        calls += 1
        if (value, calls) == (1.0, 3):
            raise KeyboardInterrupt
        return [value] * len(prompts)

    monkeypatch.setattr("rewards.rules._Rule.score", rewards)
    arguments = {"rewards": [WORDS], "window": 6, "cache": cache}
    other = write({"prompt": "p", "completions": ["a"]}, name="other.jsonl")
    score_rows(other, str(tmp_path / "other-out.jsonl"), **arguments)
    with pytest.raises(KeyboardInterrupt):
        score_rows(path, str(tmp_path / "first.jsonl"), **arguments)
    value = 2.0
    score_rows(path, str(tmp_path / "second.jsonl"), **arguments)
    value = 1.0
    score_rows(path, str(tmp_path / "first.jsonl"), **arguments)
    score_rows(path, str(tmp_path / "third.jsonl"), **arguments)
    first, second, third = (
        {r for line in (tmp_path / f"{name}.jsonl").read_text().splitlines() for r in json.loads(line)["rewards"]}
        for name in ("first", "second", "third")
    )
    assert (first, second, third) == ({1.0}, {2.0}, {2.0})


def test_text_rows_beside_a_chat_template_are_said_also_where_the_cache_knows_them(write, tmp_path, capsys):
    from tiny_models import TEMPLATE

    chats = saved(tmp_path / "chats", LlamaForSequenceClassification(llama(pad_token_id=0)), letters(template=TEMPLATE))
    plain = saved(tmp_path / "plain", LlamaForSequenceClassification(llama(pad_token_id=0)), letters())
    text = {"prompt": "a b", "completions": ["c", "d"]}
    path = write(text, text)
    for k, (model, rows) in enumerate(((chats, 2), (chats, 2), (plain, 0))):
        given = path if model == chats else write(text, name="texts.jsonl")
        spec = {"name": "sequence_classifier", "model": model}
        summary = score_rows(given, str(tmp_path / f"{k}.jsonl"), rewards=[spec], cache=tmp_path / "cache")
        assert summary["text_rows_without_template"] == rows
        assert ("text rows scored without the model's chat template" in capsys.readouterr().out) == bool(rows)


@pytest.mark.parametrize("texts_first", [True, False])
def test_text_beside_conversations_is_refused_where_a_template_would_write_the_ones_alone(write, tmp_path, texts_first):
    from tiny_models import TEMPLATE

    model = saved(tmp_path / "m", LlamaForSequenceClassification(llama(pad_token_id=0)), letters(template=TEMPLATE))
    text = {"prompt": "a b", "completions": ["c", "d"]}
    messages = {"prompt": [{"role": "user", "content": "a b"}], "completions": ["c", "d"]}
    path = write(*([text, text, messages] if texts_first else [messages, messages, text]))
    places = (1, 3) if texts_first else (3, 1)
    told = rf"row {places[0]}: the prompt is text, which no chat template writes, and that of .*row {places[1]} is a "
    for on_error in ("stop", "collect"):
        with pytest.raises(UserError, match=told):
            score_rows(path, str(tmp_path / "o.jsonl"), rewards=[model], on_error=on_error, use_cache=False)
    rule = {"name": "length", "max": 9}
    assert score_rows(path, str(tmp_path / "o.jsonl"), rewards=[rule], use_cache=False)["rows"] == 3


def test_a_rows_tools_and_calls_stay_with_it_in_one_spelling(write, score):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    calling = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "a"},
        {"role": "assistant", "content": "c"},
    ]
    spelled = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "4"}]},
        {"role": "assistant", "content": "c"},
    ]
    row = {"prompt": [{"role": "user", "content": "a"}], "completions": [spelled, "d"], "tools": [{"name": "f"}]}
    (out,) = score(write(row), WORDS)
    assert out["tools"] == [{"type": "function", "function": {"name": "f"}}]
    assert out["completions"] == [calling, [{"role": "assistant", "content": "d"}]]


def test_calls_of_any_arguments_go_through_parquet_and_back(write, score):
    """Of other names, of other types, of none: Arrow would fill them up with nulls, or refuse them."""
    given = [{}, {"x": 1}, {"x": "a", "deep": {"y": [1]}}]
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": own}} for own in given]
    rows = [
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completions": [[{"role": "assistant", "content": "", "tool_calls": [call]}], "d"],
            "tools": [{"name": "f", "parameters": {"type": "object", "properties": own}}],
        }
        for call, own in zip(calls, given, strict=True)
    ]
    through = score(write(*rows), WORDS, name="out.parquet")
    read = [read_row(own, "r", 1, ignore=["rewards", "grades"]) for own in through]
    for own, other in zip(read, (read_row(row, "r", 1) for row in rows), strict=True):
        assert (own.prompt, own.completions, own.tools) == (other.prompt, other.completions, other.tools)


def test_a_rows_template_options_stay_with_it(write, score):
    options = {"enable_thinking": False}
    row = {"prompt": [{"role": "user", "content": "a"}], "completions": ["c", "d"], "chat_template_kwargs": options}
    assert score(write(row), WORDS)[0]["chat_template_kwargs"] == options


def test_cached_rewards_under_a_template_with_a_date_are_of_one_day(tmp_path, monkeypatch):
    from datetime import date

    import rewards.digest
    from rewards.config import SequenceClassifier

    class Clock(date):
        @classmethod
        def today(cls):
            return cls(2026, 11, days.pop())

    monkeypatch.setattr(rewards.digest, "date", Clock)
    digests, days = [], [28, 29]
    for name, template in (("dated", "{{ strftime_now('%d') }}{{ messages }}"), ("other", "{{ messages }}")):
        place = saved(
            tmp_path / name, LlamaForSequenceClassification(llama(pad_token_id=0)), letters(template=template)
        )
        digests += [rewards.digest.scorer_digest(SequenceClassifier(model=place)) for _ in range(2)]
    assert digests[0] != digests[1] and digests[2] == digests[3]
