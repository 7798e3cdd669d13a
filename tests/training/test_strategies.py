"""What is refused where processes hold parts of a model."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from equal_runs import FULL, MOVING, SETTINGS

from align.errors import UserError
from align.runs.build import loss_of
from align.training.arguments import training_arguments
from align.training.optimizers import class_and_options
from align.training.strategies import ALL, BY_NORM, ELEMENTWISE, FSDP, LIMITS, ZERO, check_strategy, strategy_of
from align.training.train import train

ADALORA = {"policy": {"adapter": {"name": "adalora", "rank": 2}}}
MIDDLE = {"policy": {"adapter": {"name": "lora_sb", "rank": 2}}}
REFUSED = (
    ("policy.adapter: adalora", ADALORA, ALL),
    ("policy.adapter: its factors", MIDDLE, FSDP),
    ("reference: moving", {"reference": MOVING}, ALL),
    ("reward.balance: more", SETTINGS["more"], ALL),
    ("objective: kto's baseline", {"objective": {"name": "kto"}, **FULL}, FSDP),
    ("reference.cache: false", {"reference": {"cache": False}, **FULL}, FSDP),
    ("policy.quantization: 4bit", {"policy": {"quantization": "4bit"}}, ("fsdp2", "zero3")),
    ("train.optimizer: it is none", {"train": {"optimizer": "lamb"}}, ZERO),
    ("train.optimizer: it is none", {"train": {"optimizer": "adafactor"}}, ALL),
    ("train.optimizer: it is none", {"train": {"optimizer": "muon"}}, ALL),
)


@pytest.mark.parametrize("strategy", [None, *ALL])
@pytest.mark.parametrize(("said", "sections", "refusing"), REFUSED)
def test_what_a_strategy_would_change_is_refused_by_name(make_setting, said, sections, refusing, strategy):
    recipe, _ = make_setting("run", sections)
    if strategy not in refusing:
        check_strategy(recipe, loss_of(recipe), strategy)
        return
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        check_strategy(recipe, loss_of(recipe), strategy)


def test_every_limit_is_tried(make_setting):
    recipes = [make_setting("run", sections)[0] for _, sections, _ in REFUSED]
    assert all(any(limit.found(recipe, loss_of(recipe)) for recipe in recipes) for limit in LIMITS)


@pytest.mark.parametrize("own", [None, *ALL])
def test_the_strategy_is_that_of_the_launch(monkeypatch, make_setting, own):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(own == "fsdp2").lower())
    plugin = SimpleNamespace(zero_stage=int(own[-1])) if own in ZERO else None
    assert strategy_of(SimpleNamespace(world_size=2, deepspeed_plugin=plugin)) == own
    assert strategy_of(SimpleNamespace(world_size=1, deepspeed_plugin=plugin)) == (own if own in ZERO else None)


def test_a_refusal_leaves_no_run_directory(monkeypatch, make_setting):
    recipe, _ = make_setting("run", {"train": {"optimizer": "adafactor"}})
    monkeypatch.setattr("align.training.run.strategy_of", lambda arguments: "zero3")
    with pytest.raises(UserError, match="under ZeRO-3; take one of adamw_torch"):
        train(recipe)
    assert not Path(recipe.output).exists()


@pytest.mark.parametrize("name", [name for own in (ELEMENTWISE | BY_NORM).values() for name in own])
def test_states_of_optimizers_are_tensors(make_setting, tmp_path, name):
    """A checkpoint of parts holds tensors alone."""
    recipe, _ = make_setting("run", {"train": {"optimizer": name}})
    arguments = training_arguments(recipe.train, checkpoints=tmp_path, run_name="run", recipe_values={})
    kind, options = class_and_options(recipe.train, arguments, steps=3)
    weight = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = kind([weight], **options)
    for _ in range(2):
        weight.square().sum().backward()
        optimizer.step()
    assert all(isinstance(value, torch.Tensor) for value in optimizer.state[weight].values())
