"""Objectives and scores from a user's file: the same numbers as built-in ones, checked before training, held to."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch

from align.errors import UserError
from align.objectives import OBJECTIVES, PROPERTIES, SCORES
from align.objectives.contract import check_objective, check_score_function
from align.objectives.scores import REVERSE_KL
from align.recipe import parse_recipe
from align.runs.build import loss_of
from align.training.inspect import inspect_recipe
from align.training.train import train

OURS = """
import torch.nn.functional as F
from align.objectives.lists import over_ordered_pairs

def mine(scores, grades, list_mask, *, margin=0.0):
    return over_ordered_pairs(lambda d: -F.logsigmoid(d - margin), scores, grades, list_mask)

def ratio(policy_logprobs, reference_logprobs, completion_mask, list_index, *, beta, power=0.0):
    ratios = (policy_logprobs - reference_logprobs).masked_fill(~completion_mask, 0)
    return beta * ratios.sum(dim=1) / completion_mask.sum(dim=1) ** power

def plain(policy_logprobs, reference_logprobs, completion_mask, list_index):
    assert reference_logprobs is None
    return 0.3 * policy_logprobs.masked_fill(~completion_mask, 0).sum(dim=1)
"""
"""Copies of `logistic`, `log_ratio` (of `log_ratio_mean` with power 1) and `likelihood`."""
STEPS = {"steps": 3, "save_steps": 1}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OURS)
    return path


@pytest.mark.parametrize(
    ("built_in", "own"),
    [
        ({"objective": {"name": "logistic", "margin": 0.5}}, {"objective": {"function": "mine", "margin": 0.5}}),
        (
            {"score": {"name": "log_ratio_mean", "beta": 0.4}, "objective": "squared"},
            {"score": {"function": "ratio", "beta": 0.4, "power": 1.0}, "objective": "squared"},
        ),
        (
            {"score": {"name": "likelihood", "beta": 0.3}, "objective": "logistic"},
            {"score": {"function": "plain", "reference": False}, "objective": "logistic"},
        ),
        (
            {"task": "reward", "objective": "logistic"},
            {"task": "reward", "objective": {"function": "mine"}},
        ),
    ],
    ids=["objective", "score", "score-without-reference", "reward"],
)
def test_a_copy_of_a_built_in_one_gives_its_losses(make_recipe, file, built_in, own):
    for section in own.values():
        if isinstance(section, dict):
            section |= {"name": "python", "function": f"{file}:{section['function']}"}
    ours, theirs = (
        train(make_recipe("own", **own, train=STEPS)),
        train(make_recipe("built_in", **built_in, train=STEPS)),
    )
    assert losses(ours.path) == losses(theirs.path) and len(losses(ours.path)) == 3
    assert ours.summary["eval_after"]["loss"] == theirs.summary["eval_after"]["loss"]


def test_an_interrupted_run_goes_on_to_the_same_and_only_with_the_same_file(make_recipe, file):
    own = {"objective": {"name": "python", "function": f"{file}:mine", "margin": 0.2}, "train": STEPS}
    whole = train(make_recipe("whole", **own))
    begun = shutil.copytree(whole.path, whole.path.parent / "begun")
    shutil.rmtree(begun / "checkpoints" / "checkpoint-3")
    (begun / "summary.json").unlink()
    recipe = make_recipe("begun", **own)
    file.write_text(OURS + "\n# another thought\n")
    for run in (recipe, make_recipe("whole", **own)):
        with pytest.raises(UserError, match=r"was begun with another .*mine\.py; put the old file back"):
            train(run)
    file.write_text(OURS)
    assert losses(train(recipe).path) == losses(whole.path)


def test_a_recipe_runs_no_code_until_it_trains(make_recipe, file, tmp_path):
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n" + OURS)
    own = {"name": "python", "function": f"{file}:mine"}
    recipe = make_recipe(objective=own, score=own | {"function": f"{file}:ratio"})
    parse_recipe(json.loads(json.dumps(recipe.model_dump(mode="json"))), origin="read back")
    inspect_recipe(recipe, rows=1)
    assert not (tmp_path / "ran").exists()
    loss_of(recipe)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("mine.py", "`objective.0.python.function`: 'mine.py' is not of the form file.py:function"),
        ("mine:f", "is not of the form file.py:function"),
        ("nowhere.py:f", r"nowhere.py:f: cannot read nowhere.py \(No such file"),
        ("mine.py:f", "mine.py:f: the file has no function `f`"),
        ("broken.py:f", "broken.py: its code fails with ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_is_not_there_is_refused(file, monkeypatch, place, sentence):
    monkeypatch.chdir(file.parent)
    (file.parent / "broken.py").write_text("1 / 0\n")
    tree = {"output": "o", "policy": {"model": "m"}, "data": {"sources": ["a"]}}
    with pytest.raises(UserError, match=sentence):
        loss_of(parse_recipe(tree | {"objective": {"name": "python", "function": place}}, origin="test"))


BROKEN = {
    "scores.where(list_mask, 0).sum()": r"gives a tensor of shape \[\] for 6 lists, not one loss per list",
    "scores.where(list_mask, 0)": r"gives a tensor of shape \[6, 5\] for 6 lists",
    "[0.0]": "gives list, not a tensor of floats",
    "list_mask.sum(dim=1)": "gives Tensor, not a tensor of floats",
    "scores.sum(dim=1)": "gives a number that is not finite; padding",
    "scores.nan_to_num(1.0).sum(dim=1)": "has a gradient where there is only padding",
    "(scores.where(list_mask, 0) + (scores - scores.detach()).nan_to_num(0.0)).sum(dim=1)": "has a gradient where",
    "(scores.where(list_mask, 0) * torch.arange(5)).sum(dim=1)": "depends on the order of a list's completions",
    "(scores - scores[list_mask].mean()).where(list_mask, 0).sum(dim=1)": "depends on which other lists",
    "(scores.where(list_mask, 0) / scores.shape[1]).sum(dim=1)": "depends on which other lists are in the batch",
    "scores.detach().where(list_mask, 0).sum(dim=1)": "gives numbers without a gradient",
    "(scores * 0).where(list_mask, 0).sum(dim=1).abs().sqrt()": "has a gradient that is not finite",
    "(grades + scores.where(list_mask, 0)).sum(dim=1)": "gives a number that is not finite; padding",
    "grades.nan_to_num(1.0).sum(dim=1) + scores.where(list_mask, 0).sum(dim=1)": "depends on what padding holds",
    "scores.no_such_thing": "fails on 6 lists made up to try it: AttributeError",
}
"""An objective's body -> what is said of it."""


@pytest.mark.parametrize("body", BROKEN)
def test_an_objective_that_breaks_the_contract_is_refused_with_what_it_breaks(file, body):
    file.write_text(f"import torch\ndef loss(scores, grades, list_mask):\n    return {body}\n")
    recipe = {"output": "o", "policy": {"model": "m"}, "data": {"sources": ["a"]}}
    recipe["objective"] = {"name": "python", "function": f"{file}:loss"}
    with pytest.raises(UserError, match=rf"^{file}:loss: ({BROKEN[body]})"):
        loss_of(parse_recipe(recipe, origin="test"))


BROKEN_SCORES = {
    "policy.sum(dim=1)": "gives a number that is not finite; padding",
    "policy.where(mask, 0).sum()": r"gives a tensor of shape \[\] for 5 completions, not one score per completion",
    "(policy - reference).where(mask, 0).cumsum(dim=0).sum(dim=1)": "depends on the order of the completions",
    "reference.where(mask, 0).sum(dim=1)": "gives numbers without a gradient",
    "policy.where(mask, 0).sum(dim=1) + mask.sum(dim=1).log().log()": "gives a number that is not finite",
}


@pytest.mark.parametrize("body", BROKEN_SCORES)
def test_a_score_that_breaks_the_contract_is_refused_with_what_it_breaks(file, body):
    file.write_text(f"def score(policy, reference, mask, lists):\n    return {body}\n")
    recipe = {"output": "o", "policy": {"model": "m"}, "data": {"sources": ["a"]}, "objective": "logistic"}
    recipe["score"] = {"name": "python", "function": f"{file}:score"}
    with pytest.raises(UserError, match=rf"^{file}:score: {BROKEN_SCORES[body]}"):
        loss_of(parse_recipe(recipe, origin="test"))


@pytest.mark.parametrize("options", [{"marginn": 0.5}, {"margin": "wide"}])
def test_an_option_that_the_function_does_not_take_is_refused(file, options):
    recipe = {"output": "o", "policy": {"model": "m"}, "data": {"sources": ["a"]}}
    recipe["objective"] = {"name": "python", "function": f"{file}:mine"} | options
    with pytest.raises(UserError, match="mine.py:mine: fails on 6 lists made up to try it: TypeError"):
        loss_of(parse_recipe(recipe, origin="test"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_built_in_objective_keeps_the_contract(name):
    check_objective(OBJECTIVES[name], name, PROPERTIES[name], {})


@pytest.mark.parametrize("name", SCORES)
def test_every_built_in_score_keeps_the_contract(name):
    takes = inspect.signature(SCORES[name]).parameters
    options = {"divergence": {**REVERSE_KL, "name": "js"}} if "divergence" in takes else {}
    check_score_function(SCORES[name], name, options)


def test_trying_a_function_leaves_the_random_numbers_of_a_run_alone(file):
    file.write_text(
        OURS + "\nimport torch\n"
        "def noisy(scores, grades, list_mask):\n    torch.rand(3)\n    return mine(scores, grades, list_mask)\n"
    )
    recipe = {"output": "o", "policy": {"model": "m"}, "data": {"sources": ["a"]}}
    recipe["objective"] = {"name": "python", "function": f"{file}:noisy"}
    before = torch.get_rng_state()
    loss_of(parse_recipe(recipe, origin="test"))
    assert torch.equal(torch.get_rng_state(), before)
