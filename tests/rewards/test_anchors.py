"""Rewards from comparisons with answers of known worth, by judges whose opinion is known."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from rewards import RowError, ScorerError, load_scorer
from rewards.anchors import thurstone
from rewards.digest import scorer_digest
from rewards.judge import JudgeScorer
from rewards.registry import ScorerConfig
from rewards.types import AskingOptions, Tally


def phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


class Opinion:
    """A voice that finds the first of two numbers better with a probability of their difference."""

    def __init__(self, of: Callable[[float], float]) -> None:
        self.of = of

    def verdicts(self, questions, words, *, reasoning):
        sides = [question.split("|")[1:] for question in questions]
        found = [self.of(float(first) - float(second)) for first, second in sides]
        return [[math.log(p) if p else -math.inf, math.log1p(-p) if p < 1 else -math.inf] for p in found]


def judge(voice: object, file: Path, *rows: dict) -> JudgeScorer:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asking = dict.fromkeys(AskingOptions.__annotations__) | {"mode": "anchors", "anchors": str(file), "reasoning": 0}
    return JudgeScorer(voice, name="j", tally=Tally(), **asking | {"question": "{prompt}|{first}|{second}"})


def row(prompt: object, worths: list[float]) -> dict:
    return {"prompt": prompt, "completions": [str(own) for own in worths], "rewards": worths}


def bisected(anchors: list[float], won: list[float]) -> float:
    """Where the log posterior is flat, its slope by autograd."""
    a, w = torch.tensor(anchors, dtype=torch.float64), torch.tensor(won, dtype=torch.float64)
    low, high = min(anchors) - 50, max(anchors) + 50
    while high - low > 1e-11:
        s = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        log_phi = torch.special.log_ndtr
        (w * log_phi(s - a) + (1 - w) * log_phi(a - s)).sum().sub((s - a.mean()) ** 2 / 2).backward()
        low, high = (s.item(), high) if s.grad > 0 else (low, s.item())
    return low


def test_the_worth_is_where_the_posterior_is_highest():
    draw = random.Random(0)
    for case in range(60):
        spread = (0.5, 3, 40)[case % 3]
        anchors = [draw.uniform(-spread, spread) + 5 for _ in range(draw.randint(1, 12))]
        won = [draw.choice([0.0, 1.0, draw.random()]) for _ in anchors]
        assert thurstone(anchors, won) == pytest.approx(bisected(anchors, won), abs=1e-9)


def test_both_orders_of_each_prompts_own_anchors(tmp_path):
    """A judge that leans to what it sees first; the anchors of a prompt may stand in two lines, or be messages'."""

    def leaning(difference: float) -> float:
        return phi(difference + 0.4)

    message = [{"role": "user", "content": "q"}]
    scorer = judge(Opinion(leaning), tmp_path / "a.jsonl", row("p", [0, 1]), row(message, [3]), row("p", [-2]))
    known = {"p": [0, 1, -2], "q": [3]}
    asked = [("p", 0.5), ("q", 2.0), ("p", -1.0)]
    won = [[(leaning(s - a) + 1 - leaning(a - s)) / 2 for a in known[prompt]] for prompt, s in asked]
    expected = [bisected(known[prompt], own) for (prompt, _), own in zip(asked, won, strict=True)]
    assert scorer.score([p for p, _ in asked], [str(s) for _, s in asked]) == pytest.approx(expected, abs=1e-8)
    with pytest.raises(RowError, match="a.jsonl: no anchors of this prompt; add a row"):
        scorer.score(["p", "other"], ["0", "0"])


def test_known_worths_are_found_again(tmp_path):
    draw = random.Random(1)
    anchors, worths = [draw.gauss(0, 1) for _ in range(300)], [-1.5, -0.5, 0.0, 0.7, 1.6]
    sure = judge(Opinion(phi), tmp_path / "a.jsonl", row("p", anchors))
    assert sure.score(["p"] * 5, list(map(str, worths))) == pytest.approx(worths, abs=0.025)
    said = judge(Opinion(lambda d: float(draw.random() < phi(d))), tmp_path / "b.jsonl", row("p", anchors))
    assert said.score(["p"] * 5, list(map(str, worths))) == pytest.approx(worths, abs=0.2)


def test_what_cannot_be_anchors_is_refused(tmp_path):
    spec = {"name": "served_judge", "url": "http://localhost:1", "model": "m", "mode": "anchors"}
    file = tmp_path / "a.jsonl"
    good = json.dumps(row("p", [1.0]))
    others = [good.replace("[1.0]", rewards) for rewards in ("[1.0, 2.0]", "[NaN]", "null")]
    for line in ("[", "[]", *others):
        file.write_text(f"{good}\n{line}\n")
        with pytest.raises(
            ScorerError, match="a.jsonl, line 2: no anchors; give `prompt`, `completions` and `rewards`"
        ):
            load_scorer({**spec, "anchors": str(file)})
    cases = [
        ({}, "`mode: anchors` and the file `anchors` go together"),
        ({"mode": "scale", "anchors": str(file)}, "go together"),
        ({"anchors": str(tmp_path / "absent.jsonl")}, "anchors: cannot read .*absent.jsonl"),
        ({"anchors": str(file), "question": "{prompt} {completion}"}, "does not hold {first}, {second}"),
    ]
    for keys, message in cases:
        with pytest.raises(ScorerError, match=message):
            load_scorer(spec | keys)


def test_other_anchors_are_another_scorer(tmp_path):
    """What is kept of rewards is not taken for those beside other anchors of the same file's name."""
    file, found = tmp_path / "a.jsonl", []
    for worth in (1.0, 2.0):
        file.write_text(json.dumps(row("p", [worth])))
        spec = {"name": "served_judge", "url": "http://localhost:1", "model": "m", "mode": "anchors"}
        found.append(scorer_digest(TypeAdapter(ScorerConfig).validate_python({**spec, "anchors": str(file)})))
    assert found[0] != found[1]
