"""The held-out loss is of what is trained, the ranking figures are of whole lists."""

import math

import pytest
from accelerate import Accelerator

from align.data.select import with_trained_places
from align.evaluate.lists import evaluate_lists
from align.model.config import PolicySection
from align.model.forward import TokenScorer
from align.model.policy import load_policy
from align.runs.build import loss_of, prepare
from align.training.train import train


def measured(policy, recipe, lists, budget):
    options = {"tokens_per_batch": budget, "accelerator": Accelerator()}
    return evaluate_lists(TokenScorer(policy), policy, loss_of(recipe), lists, **options)


@pytest.mark.parametrize(
    ("objective", "score", "data"),
    [
        ({"name": "logistic"}, {"name": "likelihood_mean", "beta": 2.0}, {"select": "best_worst"}),
        ({"name": "lambda"}, {"name": "likelihood_mean", "beta": 2.0}, {"list_size": 3}),
        ([{"name": "hinge"}, {"name": "sft"}], {"name": "likelihood"}, {"select": "best_worst"}),
    ],
)
def test_it_is_the_loss_of_the_reduced_lists(make_recipe, tiny_policy, objective, score, data):
    recipe = make_recipe(objective=objective, score=score, data=data | {"eval_fraction": 0.5})
    lists = prepare(recipe).heldout
    policy = load_policy(PolicySection(model=str(tiny_policy), adapter=recipe.policy.adapter))
    marked = with_trained_places(lists, select=recipe.data.select, list_size=recipe.data.list_size, seed=0)

    def reduced(row):
        return {name: [row[name][k] for k in row["trained"]] for name in ("completion_ids", "grades")}

    alone = measured(policy, recipe, marked.map(reduced).remove_columns("trained"), 10**6)
    whole = measured(policy, recipe, lists, 10**6)
    for budget in (10**6, 60):
        found = measured(policy, recipe, marked, budget)
        assert found["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert abs(found["loss"] - whole["loss"]) > 1e-3, "whole lists have another"
        for name in whole.keys() - {"loss"}:
            assert found[name] == pytest.approx(whole[name], abs=1e-5), name


@pytest.mark.parametrize("task", [{}, {"task": "reward", "objective": {"name": "logistic"}}])
def test_pairs_begin_at_ln_2_held_out_as_in_training(make_recipe, task, capsys):
    sections = {"objective": {"name": "logistic"}, "data": {"select": "best_worst"}} | task
    result = train(make_recipe(**sections, train={"steps": 1}))
    if not task:
        assert result.summary["eval_before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert 0 < result.summary["eval_before"]["loss"] < 3, "of one pair a list, not of all of its pairs"
    assert "the held-out loss is of the completions" in (result.path / "events.log").read_text()
