"""Every optimizer name of transformers trains, or is refused before there is a run directory."""

import importlib.util
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers.training_args import OptimizerNames

from align.errors import UserError
from align.recipe.optimizers import IMPOSSIBLE, PACKAGES, why_not
from align.training.train import train

TORCHS_OWN = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
NAMES = [name.value for name in OptimizerNames]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_trains_two_steps_or_is_refused_before_the_run_directory(name, make_recipe, tmp_path):
    section = {"optimizer": name, "steps": 2, "lists_per_step": 2, "weight_decay": 0.01}
    try:
        recipe = make_recipe(train=section, sampling={"prompts": 0})
    except UserError as error:
        assert name not in TORCHS_OWN
        assert not (tmp_path / "run").exists()
        assert f"`train.optimizer`: `{name}`" in str(error) and "\n" not in str(error)
        lacking = [package for module, (package, _) in PACKAGES.items() if importlib.util.find_spec(module) is None]
        assert any(f"pip install {package};" in str(error) for package in lacking) or any(
            reason in str(error) for reason in IMPOSSIBLE.values()
        )
        return
    result = train(recipe)
    assert result.summary["steps"] == 2
    moved = [
        t for name, t in load_file(Path(result.path) / "adapter" / "adapter_model.safetensors").items() if "B" in name
    ]
    assert moved and all(tensor.abs().max() > 0 for tensor in moved)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_that_needs_a_package_is_forgotten(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert bool(why_not(name)) == (name not in TORCHS_OWN)
