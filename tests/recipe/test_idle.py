"""Keys that reach nothing under the other keys are refused or said, and no others."""

from pathlib import Path

import pytest

from align.errors import UserError
from align.model.load import model_folder
from align.recipe import load_recipe, parse_recipe
from align.recipe.idle import IDLE, idle_keys
from align.training.inspect import inspect_recipe
from rewards import ScorerError
from rewards.loading import folder_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
ONLINE = {"rollout.reward": {"name": "length", "min": 1}, "online": {}}
TRANSFORMERS = {"rollout.engine": {"name": "transformers"}}
REWARD = {"task": "reward", "objective": {"name": "bradley_terry"}}
TABLE = {
    "reference.cache_dir": ("c", {"reference.cache": False}),
    "reference.cache": (False, REWARD),
    "reference.every": (3, {}),
    "reference.mixture": (0.3, {}),
    "data.eval_fraction": (0.3, {"data.eval_sources": ["h.jsonl"]}),
    "data.list_size": (4, {"data.select": "best_worst"}),
    "data.select": ("best_worst", {"task": "sft", "objective": []}),
    "data.max_prompt_length": (64, {"data.max_length": 64}),
    "sampling.reward": ({"name": "length", "min": 1}, {"sampling.prompts": 0}),
    "sampling.prompts": (3, REWARD),
    "sampling.max_tokens": (3, REWARD),
    "sampling.temperature": (0.5, REWARD),
    "sampling.token_lists": (3, REWARD),
    "sampling.top_k": (5, {"sampling.temperature": 0}),
    "sampling.top_p": (0.5, {"sampling.temperature": 0}),
    "rollout.top_k": (5, {"rollout.temperature": 0, "rollout.completions": 1}),
    "rollout.top_p": (0.5, {"rollout.temperature": 0, "rollout.completions": 1}),
    "rollout.min_p": (0.5, {"rollout.temperature": 0, "rollout.completions": 1}),
    "rollout.agreement_bound": (0.1, {"rollout.agreement_prompts": 0}),
    "rollout.sync": ("merged", TRANSFORMERS),
    "rollout.engine.timeout": (5.0, {"rollout.engine.in_process": True, "rollout.engine.name": "vllm"}),
    "train.epochs": (2.0, {"train.steps": 5}),
    "train.warmup_ratio": (0.2, {"train.schedule": "constant"}),
    "train.activation_memory_gb": (1.0, {"train.gradient_checkpointing": True}),
    "train.project": ("mine", None),
    "train.adam_beta1": (0.5, {"train.optimizer": "sgd"}),
    "train.adam_beta2": (0.5, {"train.optimizer": "adafactor"}),
}
"""A key with a value, and the keys under which it does nothing; without them it acts."""


def recipe_of(**keys):
    tree = {"output": "o", "policy": {"model": "m"}, "data": {"sources": ["r.jsonl"]}, "objective": {"name": "lambda"}}
    for key, value in keys.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return parse_recipe(tree, origin="test")


def said_of(key: str, **keys) -> list[str]:
    return [sentence for sentence in idle_keys(recipe_of(**keys)) if sentence.startswith(f"{key} has no effect: ")]


def test_every_key_of_the_table_is_tried_here():
    apart = {"rollout.engine.while_training", "online.reference_every"}
    assert {key for idle in IDLE for key in idle.keys.split()} == TABLE.keys() | apart


@pytest.mark.parametrize("key", [key for key, (_, under) in TABLE.items() if under])
def test_a_key_that_cannot_act_is_said_and_one_that_can_is_not(key):
    value, under = TABLE[key]
    assert len(said_of(key, **under, **{key: value})) == 1
    assert not said_of(key, **{key: value}), "which acts under the defaults"
    assert not said_of(key, **under), "which is not set"


def test_keys_that_act_under_some_value_alone():
    assert said_of("train.project", **{"train.project": "mine"})
    asleep = {"rollout.engine": {"name": "vllm", "while_training": "asleep"}}
    assert said_of("rollout.engine.while_training", **asleep)
    assert not said_of("rollout.engine.while_training", **asleep | ONLINE)
    every = ONLINE | {"online": {"reference_every": 3}}
    assert said_of("online.reference_every", **every)
    assert not said_of("online.reference_every", **every | {"online": {"reference_every": 3, "reference": "moving"}})
    ches = {"reference": {"cache": False, "cache_dir": "c"}, "data.ches": {"keep_fraction": 0.5}}
    assert not said_of("reference.cache_dir", **ches), "CHES is kept there"
    assert "`weight`" in idle_keys(recipe_of(**{"data.eval_sources": [{"path": "h", "weight": 2}]}))[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_that_ships_has_one(path):
    assert idle_keys(load_recipe(path)) == []


def test_it_is_said(make_recipe, caplog):
    caplog.set_level("WARNING", logger="align")
    inspect_recipe(make_recipe(train={"steps": 2, "epochs": 3}), rows=0)
    assert "train.epochs has no effect: `train.steps` says how long" in caplog.text


def test_a_revision_of_a_folder_here_is_refused(tiny_policy):
    with pytest.raises(UserError, match="policy.revision: .* a folder here, and a revision is of a hub model; leave"):
        model_folder(str(tiny_policy), "main")
    with pytest.raises(ScorerError, match="`revision`: .* is a folder here, and a revision is of a hub model; leave"):
        folder_of(str(tiny_policy), "main")
