"""Advice where figures are known: a table of figures and sentences, and the run that says them once."""

import json
import re
from pathlib import Path

import pytest

from align.data import Audit
from align.recipe.settings import TrainSection
from align.runs.build import prepare
from align.training.advice import few_heldout, few_steps, much_cut
from align.training.train import train


@pytest.mark.parametrize(
    ("steps", "section", "sentence"),
    [
        (2, {}, "2 steps in all (50 lists, 32 a step)"),
        (1, {}, "1 step in all"),
        (9, {}, "9 steps in all"),
        (10, {}, None),
        (2, {"steps": 2}, None),
    ],
)
def test_few_steps(steps, section, sentence):
    said = few_steps(steps, lists=50, train=TrainSection(**section))
    assert said.startswith(sentence) if sentence else said == ""


@pytest.mark.parametrize(
    ("figures", "max_length", "sentence"),
    [
        ({"completions": 100, "truncated_completions": 78}, 512, "78% of the completions are truncated; "),
        ({"completions": 100, "truncated_completions": 9}, 512, None),
        ({"completions": 20, "dropped_completions": 20}, 512, "50% of the completions are left out; "),
        ({"completions": 100, "truncated_completions": 78}, 1024, None),
        ({}, 512, None),
    ],
)
def test_much_cut(figures, max_length, sentence):
    said = much_cut(Audit(**figures, sequence_tokens={"p90": 1000}), max_length=max_length)
    assert said == (f"{sentence}data.max_length=1024 would keep 90%" if sentence else "")


@pytest.mark.parametrize(("lists", "error"), [(0, None), (1, "0.50"), (4, "0.25"), (25, "0.10"), (30, None)])
def test_few_heldout(lists, error):
    said = few_heldout(lists)
    assert f"known to within {error} (standard error)" in said if error else said == ""


def test_the_length_advised_keeps_what_it_says(make_recipe, tmp_path):
    """Read again with it, no more than a tenth of the completions is cut; with what was given all of them were."""
    rows = tmp_path / "long.jsonl"
    with rows.open("w") as file:
        for row in range(40):
            completions = [f" w{5 + k} " + "w9 " * (70 + 5 * row + 3 * k) for k in range(3)]
            line = {"prompt": f"w{row % 30 + 3}", "completions": completions, "grades": [2, 1, 0]}
            file.write(json.dumps(line) + "\n")

    def audit(max_length: int) -> Audit:
        return prepare(make_recipe(data={"sources": [str(rows)], "max_length": max_length})).audit

    said = much_cut(audit(64), max_length=64)
    assert said.startswith("100% of the completions are truncated")
    advised = int(re.search(r"max_length=(\d+)", said)[1])
    assert 0 < audit(advised).truncated_share <= 0.1


def test_a_run_says_it_once(make_recipe, capsys):
    recipe = make_recipe(train={"lists_per_step": 24, "epochs": 1})
    train(recipe)
    run = Path(recipe.output)
    for said in (capsys.readouterr().err.replace("\n", " "), (run / "events.log").read_text()):
        assert said.count("advice: 1 step in all (24 lists, 24 a step)") == 1
        assert said.count("advice: 6 held-out lists: a share of so few is known to within 0.20") == 1
