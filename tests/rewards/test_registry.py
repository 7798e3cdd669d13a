"""Every scorer's class names a scorer that is there and takes the class's fields."""

import importlib
import inspect
from typing import get_args

import pytest

from align.registry import Registry
from rewards import SCORERS, ScorerConfig
from rewards.config import SCORER


@pytest.mark.parametrize("name", SCORER.classes)
def test_a_class_names_a_scorer_that_takes_its_fields(name):
    config = SCORER.classes[name]
    module, scorer = SCORERS[config].split(":")
    parameters = inspect.signature(getattr(importlib.import_module(f"rewards.{module}"), scorer)).parameters
    open_ended = any(own.kind is own.VAR_KEYWORD for own in parameters.values())
    named = {own.name for own in parameters.values() if own.kind is own.KEYWORD_ONLY}
    fields = set(config.model_fields) - {"name"}
    assert named <= fields
    assert open_ended or fields == named


def test_a_specification_takes_every_registered_class():
    assert get_args(get_args(ScorerConfig)[0]) == tuple(SCORER.classes.values())


def test_a_name_that_is_taken_is_refused():
    registry: Registry = Registry("scorer")
    registry.add(SCORER.classes["length"])
    with pytest.raises(ValueError, match="two classes are the scorer `length`"):
        registry.add(SCORER.classes["length"])
