"""Of `tests/faults/hostile.py` the commands that go furthest; and where consent to code comes from."""

import os
from typing import Any

import pytest
import yaml
from hostile import ALLOW, HOSTILE, World, pairs, try_pair
from table import case

from align import load_recipe
from align.cli import main
from align.consent import not_own
from align.errors import UserError
from align.recipe.consent import code_of
from align.recipe.recipe import read_recipe
from rewards import load_scorer, read_reward

SHORT = ("train", "evaluate rows", "chat", "export merged", "score", "import", "report", "plan")
"""Commands of the default run; `-m long` takes all."""
ONCE = (
    "template that",
    "weights in",
    "safetensors with",
    "adapter in",
    "config with ten million",
    "config with 10^12 words",
    "adapter with no base",
    "model with fewer layers",
    "run whose figures are others",
)
"""Hostile things without code, by how they begin, that one command meets here."""


def marked(name: str, command: str) -> Any:
    """A pair: long, unless it may run code before those commands, or take time or memory before one."""
    short = (HOSTILE[name].consent and command in SHORT) or (name.startswith(ONCE) and command == "evaluate rows")
    return pytest.param(name, command, marks=() if short else pytest.mark.long)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("name", "command"), [marked(*pair) for pair in pairs()])
def test_nothing_of_a_strangers_runs_unasked_and_a_refusal_is_one_sentence(world, record_property, name, command):
    tried = try_pair(world, name, command)
    wrong = "; ".join(tried.faults)
    record_property(*case(f"{name} / {command}", code=tried.outcome.code, said=tried.outcome.sentence, wrong=wrong))
    assert tried.faults == []


MINE = "def f(scores, grades, list_mask):\n    return scores.masked_fill(~list_mask, 0).square().sum(-1)\n"


@pytest.fixture
def mine(world, tmp_path, monkeypatch):
    """A recipe with an objective of the user's own, in the folder that the user is in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    objective = {"name": "python", "function": "mine.py:f"}
    return world.write_recipe(tmp_path / "recipe.yaml", objective=objective, output="run", sampling={"prompts": 0})


def test_ones_own_function_is_said_and_runs_and_the_same_command_goes_on(mine, world, caplog):
    for _ in range(2):
        caplog.clear()
        outcome = world.call(["train", "recipe.yaml"])
        assert outcome.code == 0, outcome
        assert "recipe.yaml: names code that may run: mine.py:f (objective.function)" in caplog.messages
    refused = world.call(["train", "run/recipe.yaml"])
    assert refused.code == 2 and "objective.function: mine.py:f" in refused.sentence and ALLOW in refused.sentence
    assert world.call(["train", "run/recipe.yaml", ALLOW]).code == 0
    typed = ["objective.function=mine.py:f", "output=typed"]
    assert world.call(["train", "run/recipe.yaml", *typed]).code == 0
    assert "the command line: names code that may run: mine.py:f (objective.function)" in caplog.messages


def test_a_file_is_ones_own_by_its_owner_and_by_who_may_write_it(mine, tmp_path, monkeypatch):
    assert not_own(mine) is None
    mine.chmod(0o666)
    assert not_own(mine) == f"everyone on this machine can write {mine}"
    mine.chmod(0o644)
    tmp_path.chmod(0o777)
    assert not_own(mine) == f"everyone on this machine can write {tmp_path}"
    tmp_path.chmod(0o1777)  # as /tmp, where nobody replaces another's file
    assert not_own(mine) is None
    link = tmp_path / "home" / "recipe.yaml"
    link.parent.mkdir()
    link.symlink_to(mine)
    assert not_own(link) is None
    if os.getuid() == 0:
        os.chown(mine, 12345, -1)
    else:
        monkeypatch.setattr("align.consent.os.getuid", lambda: 12345)
    assert not_own(mine) == f"{mine} belongs to another user" and not_own(link) == not_own(mine)


def test_a_project_with_runs_below_it_is_no_run_directory(mine, world, tmp_path):
    below = tmp_path / "run" / "iterations" / "recipe.yaml"
    below.parent.mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(mine.read_text())
    (tmp_path / "run" / "metrics.jsonl").touch()
    below.write_text(mine.read_text())
    assert not_own(mine) is None
    assert "run is a run directory" in str(not_own(below))


def test_every_function_of_a_recipe_is_found(world, tmp_path):
    reward = {"name": "python", "function": "m:f"}
    recipe = read_recipe(
        world.write_recipe(
            tmp_path / "recipe.yaml",
            objective=[{"name": "logistic"}, {"name": "python", "function": "a.py:f"}],
            score={"name": "python", "function": "b.py:f"},
            sampling={"reward": reward},
            rollout={
                "reward": reward,
                "engine": {"name": "vllm", "options": {"max_num_seqs": 4, "enforce_eager": True, "worker_cls": "w.W"}},
                "decoding": {"name": "transfer_q", "reward": reward, "baseline": str(world.base)},
            },
        )
    )
    assert code_of(recipe) == {
        "objective.1.function": "a.py:f",
        "score.function": "b.py:f",
        "sampling.reward.function": "m:f",
        "rollout.reward.function": "m:f",
        "rollout.engine.options.worker_cls": "w.W",
        "rollout.decoding.reward.function": "m:f",
    }


def test_in_python_the_argument_is_the_consent(world, tmp_path):
    path = world.write_recipe(tmp_path / "recipe.yaml", policy={"trust_remote_code": True})
    with pytest.raises(UserError, match="a file is no consent"):
        load_recipe(path)
    assert load_recipe(path, trust_remote_code=True).policy.trust_remote_code
    assert load_recipe(path, ["policy.trust_remote_code=true"]).policy.trust_remote_code
    plain = world.write_recipe(tmp_path / "plain.yaml")
    assert not load_recipe(plain).policy.trust_remote_code
    assert load_recipe(plain, trust_remote_code=True).policy.trust_remote_code
    spec = tmp_path / "spec.yaml"
    spec.write_text("{name: python, function: 'operator:eq'}")
    for read in (load_scorer, read_reward):
        with pytest.raises(UserError, match="`operator` is Python's own module"):
            read(str(spec))
        read(str(spec), allow_code=True)
        read(yaml.safe_load(spec.read_text()))


def test_an_answer_from_the_terminal_is_no_consent(world, tmp_path, monkeypatch, capsys):
    """transformers asks where it is told neither yes nor no."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    for name, command in pairs("scorer", "code"):
        assert try_pair(world, name, command).faults == []


def test_what_is_consented_to_is_said_to_be_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "dpo", "--trust_remote_code"])
    assert "did you mean `--trust-remote-code`" in capsys.readouterr().err
