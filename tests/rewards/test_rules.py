"""Each rule on completions whose answer can be read off."""

import json
import sys

import pytest

from rewards import RowError, ScorerError, load_scorer


def score(spec: dict, *completions: str, answers: list | None = None) -> list[float]:
    prompts = ["q"] * len(completions)
    scorer = load_scorer(spec)
    return scorer.score(prompts, completions) if answers is None else scorer.score(prompts, completions, answers)


def test_length_counts_words_or_characters():
    assert score({"name": "length", "min": 2, "max": 3}, "a", "a b", "a\nb  c", "a b c d") == [0, 1, 1, 0]
    assert score({"name": "length", "unit": "characters", "max": 3}, "", "abc", "abcd") == [1, 1, 0]
    assert score({"name": "length", "min": 1}, "", "a") == [0, 1]


def test_format_is_a_json_object_or_tags_in_order():
    assert score({"name": "format", "json_object": True}, ' {"a": 1}\n', "[1]", "{a: 1}") == [1, 0, 0]
    tags = {"name": "format", "tags": ["think", "answer"]}
    good = "<think>a\nb</think>\n<answer>4</answer>"
    bad = [
        "x" + good,
        good + "x",
        "<answer>4</answer><think>a</think>",
        "<think>a</think>",
        "<think>a<think>b</think></think><answer>4</answer>",
        "<think>a</think><think>b</think><answer>4</answer>",
    ]
    assert score(tags, good, *bad) == [1, 0, 0, 0, 0, 0, 0]


def test_regex_searches_or_matches_whole():
    assert score({"name": "regex", "pattern": r"\d{2}"}, "a 12 b", "a 1 b") == [1, 0]
    assert score({"name": "regex", "pattern": r"\d{2}", "whole": True}, " 12\n", "a 12", "123") == [1, 0, 0]


def test_an_exact_answer_is_the_stated_one():
    spec = {"name": "answer"}
    right = ["Paris", " paris. ", "I think the answer is Paris.", r"so \boxed{Paris} or London", "a\n#### Paris"]
    wrong = ["London", "Paris or London", r"\boxed{Paris} no, \boxed{London}", ""]
    texts = [*right, *wrong]
    assert score(spec, *texts, answers=["Paris"] * len(texts)) == [1] * len(right) + [0] * len(wrong)
    marked = {**spec, "pattern": r"=> (\w+)"}
    assert score(marked, "=> a => b", "b", answers=["b", "b"]) == [1, 0]


def test_a_numeric_answer_is_the_same_number():
    spec = {"name": "answer", "kind": "numeric"}
    right = ["1234", "it is $1,234.00", "2468/2", "1.234e3", "7 then 1234", "#### 1234\nfrom 99"]
    wrong = ["1235", "1234 of 5", "none", "-1234", "3/0", ""]
    texts = [*right, *wrong]
    assert score(spec, *texts, answers=["a #### 1,234"] * len(texts)) == [1] * len(right) + [0] * len(wrong)
    assert score({**spec, "tolerance": 0.01}, "101", "102", answers=[100, 100]) == [1, 0]
    with pytest.raises(RowError, match="'none' in column answer holds no number"):
        score(spec, "1", answers=["none"])


def test_the_share_of_a_rows_own_rules_that_hold():
    rules = [
        {"name": "length", "max": 2},
        {"name": "regex", "pattern": "b"},
        {"name": "format", "json_object": True},
        {"name": "length", "unit": "characters", "min": 5},
    ]
    texts = ["a b", "a c", "a b c", '{"b": 1}', "a"]
    answers = [json.dumps(rules)] * 4 + [json.dumps(rules[:1])]
    assert score({"name": "constraints"}, *texts, answers=answers) == [2 / 4, 1 / 4, 2 / 4, 4 / 4, 1 / 1]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"name": "length", "max": 2}, {"name": "python", "function": "os:system"}], 'rule 2 is "python"; a row may'),
        ([{"name": "constraints"}], "a row may bring length, format, regex, and no code or model"),
        (["length"], "rule 1 is no object"),
        ([{"name": "length", "maximum": 2}], "rule 1: reward specification .*: maximum: unknown key"),
        ([{"name": "regex", "pattern": "("}], "rule 1: .* is no regular expression"),
        ([], "holds no rule; give the JSON text of a list"),
        ({"name": "length", "max": 2}, "holds no rule"),
    ],
)
def test_what_is_no_rule_of_a_row_is_refused(rules, message):
    with pytest.raises(RowError, match=f"^rules: .*{message}"):
        score({"name": "constraints", "answer_column": "rules"}, "a", answers=[json.dumps(rules)])


def test_a_pattern_that_would_go_back_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr("rewards.rules.SEARCH", 0.05)
    rule = {"name": "regex", "pattern": r"(\w|\w\w)+$"}
    with pytest.raises(RowError, match=r"^regex: '\(.* was not through with a completion of 41 characters in 0.05 s"):
        score(rule, "a" * 40 + "!")
    with pytest.raises(RowError, match="^constraints: regex: "):
        score({"name": "constraints"}, "a" * 40 + "!", answers=[json.dumps([rule])])


def test_a_function_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "def words(prompt, completion):\n    return len(completion.split()) - 1 / len(prompt)\n"
    (tmp_path / "my_rewards_under_test.py").write_text(source)
    try:
        assert score({"name": "python", "function": "my_rewards_under_test:words"}, "a b", "") == [1, -1]
        with pytest.raises(RowError, match="ZeroDivisionError"):
            load_scorer({"name": "python", "function": "my_rewards_under_test:words"}).score([""], ["a"])
        with pytest.raises(ScorerError, match="no such function"):
            load_scorer({"name": "python", "function": "my_rewards_under_test:absent"})
    finally:
        sys.modules.pop("my_rewards_under_test", None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "length"}, "bounds nothing"),
        ({"name": "length", "min": 3, "max": 2}, "larger `max`"),
        ({"name": "format"}, "give one of"),
        ({"name": "regex", "pattern": "("}, "no regular expression"),
        ({"name": "answer", "pattern": "a"}, "no group"),
        ({"name": "python", "function": "words"}, "module:function"),
        ({"name": "lenght", "max": 2}, "^reward specification .*: there is no `lenght`; did you mean `length`?"),
        ({"name": "brevity"}, "there is no `brevity`; take sequence_classifier, implicit, .*, python"),
        ({"name": "length", "maximum": 2}, "^reward specification .*: maximum: unknown key"),
        ({"model": "m", "labl": "good"}, ": labl: unknown key; did you mean `label`?"),
        ({"name": "implicit"}, ": model: missing"),
        ({"name": "length", "max": "long"}, ": max: input should be a valid integer, .*, got 'long'"),
        ("{name: [", "not valid YAML"),
        ("absent.yaml", "cannot read"),
    ],
)
def test_a_wrong_specification_is_refused(spec, message):
    with pytest.raises(ScorerError, match=message):
        load_scorer(spec)
