"""Judges: what they are asked, and what is read from their replies, hostile ones included."""

import json
import math

import pytest
import torch
from openai_stub import answers, serving, spoken
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards import RowError, ScorerError, client, load_scorer
from rewards.asking import REASON, questions_in, verdict_in


def test_both_orders_are_asked_and_each_verdict_is_its_probability():
    def judge(question):
        first, second = answers(question)
        return spoken(["A"], {"A": 0.6, " B": 0.2, "The": 0.1} if first < second else {"A": 0.1, "B": 0.3, "b": 0.1})

    with serving(judge) as (url, bodies):
        scorer = load_scorer({"name": "served_judge", "url": url, "model": "m", "mode": "pairwise"})
        assert scorer.compare(["p"] * 2, ["a", "c"], ["c", "a"]) == pytest.approx([0.6 / 0.8, 0.1 / 0.5])
        mean = (0.75 + 0.8) / 2
        assert scorer.score(["p"] * 2, ["a", "c"]) == pytest.approx([mean, 1 - mean])
    assert {body["path"] for body in bodies} == {"/v1/chat/completions"}
    assert all(body["temperature"] == 0 and body["top_logprobs"] == 20 for body in bodies)


def test_a_scale_is_the_expectation_over_its_words():
    with serving(lambda question: spoken([" ", "4"], {"4": 0.5, "5": 0.25, " 2": 0.05, "Good": 0.2})) as (url, _):
        own = load_scorer({"name": "served_judge", "url": url, "model": "m", "mode": "scale"}).score(["p"], ["a"])
    assert own == pytest.approx([(4 * 0.5 + 5 * 0.25 + 2 * 0.05) / 0.8])


def test_a_verdict_after_reasoning_is_read_behind_its_mark():
    """The `A` of the thought is no verdict, and neither is a mark within it that another follows."""
    tokens = ["A", " is", " short.", " Verdict:", " maybe.", "\nVerdict:", " ", "**", "B"]
    with serving(lambda question: spoken(tokens, {"B": 0.7, "A": 0.3})) as (url, bodies):
        spec = {"name": "served_judge", "url": url, "model": "m", "mode": "pairwise", "reasoning": 64}
        assert load_scorer(spec).compare(["p"], ["a"], ["b"]) == pytest.approx([0.3])
    assert "Reason step by step" in bodies[0]["messages"][0]["content"] and bodies[0]["max_tokens"] > 64


def test_a_checklist_is_written_once_for_a_prompt_and_kept(tmp_path):
    def judge(question):
        if "Write a checklist" in question:
            return spoken(["1. Is it kind?\n- Is it long?\nWell.\n2) Is it kind?"])
        return spoken(["Yes"], {"Yes": 0.9, "No": 0.1} if "Is it kind?" in question else {"Yes": 0.2, "No": 0.6})

    file = tmp_path / "lists.jsonl"
    with serving(judge) as (url, bodies):
        spec = {"name": "served_judge", "url": url, "model": "m", "mode": "checklist", "checklists": str(file)}
        expected = (0.9 + 0.2 / 0.8) / 2
        assert load_scorer(spec).score(["p", "p", "q"], ["a", "b", "a"]) == pytest.approx([expected] * 3)
        written = sum("Write a checklist" in body["messages"][0]["content"] for body in bodies)
        assert written == 2 == len(file.read_text().splitlines())
        with file.open("a") as kept:
            kept.write('{"key": "torn')  # by a kill
        assert load_scorer(spec).score(["r", "q"], ["a", "b"]) == pytest.approx([expected] * 2)
        again = sum("Write a checklist" in body["messages"][0]["content"] for body in bodies)
    assert again == 3 and json.loads(file.read_text().splitlines()[-1])["questions"] == ["Is it kind?", "Is it long?"]
    assert questions_in("none here\n?") == []


HOSTILE = {
    "no log-probabilities, a plain verdict": (spoken(["B"]), 0.0),
    "a verdict in words": (spoken(["I prefer B."]), 0.0),
    "both": (spoken(["A or B"]), None),
    "neither": (spoken(["As an AI model"]), None),
    "nothing": ({"choices": [{"message": {"content": None}}]}, None),
    "alternatives that are none of the words": (spoken(["The"], {"The": 0.9, "I": 0.1}), None),
    "a probability above 1": ({"choices": [{"message": {"content": "hm"}, "logprobs": {"content": [
        {"token": "A", "top_logprobs": [{"token": "A", "logprob": 800.0}]}]}}]}, None),
    "no number": ({"choices": [{"message": {"content": "A"}, "logprobs": {"content": [
        {"token": "A", "top_logprobs": [{"token": "A", "logprob": "high"}]}]}}]}, 1.0),
    "not a number": ({"choices": [{"message": {"content": "A"}, "logprobs": {"content": [
        {"token": "A", "top_logprobs": [{"token": "A", "logprob": math.nan}]}]}}]}, 1.0),
    "logprobs of another kind": ({"choices": [{"message": {"content": "A"}, "logprobs": [7]}]}, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_reply_does_not_say_is_no_verdict(kind):
    reply, expected = HOSTILE[kind]
    with serving(lambda question: reply) as (url, _):
        scorer = load_scorer({"name": "served_judge", "url": url, "model": "m", "mode": "pairwise"})
        assert scorer.compare(["p"], ["a"], ["b"]) == [expected]
        if expected is None:
            with pytest.raises(RowError, match="holds none of the verdicts"):
                scorer.score(["p"] * 2, ["a", "b"])


@pytest.mark.parametrize("reply", [b"[]", b'{"choices": []}', b'{"choices": [{"message": "A"}]}', b"7"])
def test_a_server_of_another_kind_is_named(reply):
    with serving(lambda question: reply) as (url, _):
        scorer = load_scorer({"name": "served_judge", "url": url, "model": "m"})
        with pytest.raises(ScorerError, match=r"holds no choices\[0\].message.content"):
            scorer.score(["p"], ["a"])


def test_an_answer_that_is_cut_off_is_asked_for_again(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    cut_off = serving(lambda question: b'{"choices": [')
    with cut_off as (url, bodies), pytest.raises(ScorerError, match="no answer after 5 attempts"):
        load_scorer({"name": "served_judge", "url": url, "model": "m"}).score(["p"], ["a"])
    assert len(bodies) == 5 and waits == [1, 2, 4, 8]


def test_a_key_is_sent_and_one_that_is_not_there_is_named(monkeypatch):
    spec = {"name": "served_judge", "model": "m", "api_key": "JUDGE_KEY"}
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ScorerError, match="JUDGE_KEY is not set"):
        load_scorer({**spec, "url": "http://localhost:1/v1"})
    monkeypatch.setenv("JUDGE_KEY", "secret-word")
    with serving(lambda question: spoken(["Yes"])) as (url, bodies):
        assert load_scorer({**spec, "url": url}).score(["p"], ["a"]) == [1.0]
    assert bodies[0]["key"] == "Bearer secret-word"


def test_a_prompt_that_spells_a_name_in_braces_is_not_filled_in():
    with serving(lambda question: spoken(["A" if answers(question) == ("{second}", "b") else "B"])) as (url, _):
        scorer = load_scorer({"name": "served_judge", "url": url, "model": "m", "mode": "pairwise"})
        assert scorer.compare(["{first}"], ["{second}"], ["b"]) == [1.0]


def test_a_local_judge_reasons_before_its_verdict(tiny_policy):
    """The thought is transformers' greedy text, and the verdict's probability that of the next token behind it."""
    spec = {"name": "judge", "model": str(tiny_policy), "mode": "pairwise", "reasoning": 5, "verdicts": ("w20", "w21")}
    question = "{prompt} w9 {first} w9 {second}"
    (found,) = load_scorer({**spec, "question": question}).compare(["w3 w4"], ["w5"], ["w6 w7"])
    model, words = AutoModelForCausalLM.from_pretrained(tiny_policy), AutoTokenizer.from_pretrained(tiny_policy)
    asked = words("w3 w4 w9 w5 w9 w6 w7" + REASON, return_tensors="pt")
    ids, mask = asked["input_ids"], asked["attention_mask"]
    drawn = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5, pad_token_id=0)
    thought = drawn[0, ids.shape[1] :]
    text = "w3 w4 w9 w5 w9 w6 w7" + REASON + words.decode(thought, skip_special_tokens=True) + "\nVerdict:"
    logits = model(words(text, return_tensors="pt")["input_ids"]).logits[0, -1]
    assert found == pytest.approx(torch.sigmoid(logits[20] - logits[21]).item(), abs=1e-5)


def test_the_expectation_of_a_local_judge_is_over_its_own_tokens(tiny_policy):
    spec = {"name": "judge", "model": str(tiny_policy), "mode": "scale", "verdicts": ("w10", "w11", "w12")}
    (found,) = load_scorer({**spec, "question": "{prompt} w9 {completion}"}).score(["w3 w4"], ["w5"])
    model, words = AutoModelForCausalLM.from_pretrained(tiny_policy), AutoTokenizer.from_pretrained(tiny_policy)
    logits = model(words("w3 w4 w9 w5\nVerdict:", return_tensors="pt")["input_ids"]).logits[0, -1, 10:13]
    assert found == pytest.approx((logits.softmax(-1) @ torch.tensor([1.0, 2, 3])).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"mode": "checklist", "question": "{prompt} {completion}"}, "{check}"),
        ({"mode": "pairwise", "verdicts": ("A", "B", "C")}, "verdicts: pairwise has two"),
        ({"mode": "scale", "log_odds": True}, "log_odds"),
        ({"mode": "stars"}, "stars"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(spec, message):
    with pytest.raises(ScorerError, match=message):
        load_scorer({"name": "served_judge", "url": "http://localhost:1/v1", "model": "m", **spec})


def test_a_verdict_is_a_whole_word():
    assert verdict_in("A nice answer. Verdict: B", ("A", "B")) == "B"
    assert verdict_in("Absolutely", ("A", "B")) is None
    assert verdict_in("10", ("1", "2")) is None
