"""Every argument of TRL's constructors and configurations is one of ours, in its place and with its default."""

import ast
import inspect
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import pytest
from same_script import pairs, trainer
from transformers import AutoTokenizer, TrainingArguments

import align.trl
from align.errors import UserError
from align.trl.answers import OF_ONE, REFUSED, WITHOUT_EFFECT, answer
from align.trl.config import AlignConfig
from align.trl.replace import ROOMS

NAMES = tuple(ROOMS)


def theirs_and_ours(name, kind):
    return getattr(import_module(ROOMS[name]), name + kind), getattr(align.trl, name + kind)


@pytest.mark.parametrize("name", NAMES)
def test_constructors_take_trls_arguments_in_trls_order(name):
    theirs, ours = (inspect.signature(c.__init__).parameters for c in theirs_and_ours(name, "Trainer"))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[key].default == theirs[key].default for key in theirs)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_have_trls_fields_and_defaults(name):
    def defaults(config):
        return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}

    theirs, ours = map(defaults, theirs_and_ours(name, "Config"))
    assert {key: ours.get(key, "lacks") for key in theirs} == theirs


def test_what_is_answered_is_said(tmp_path, caplog):
    common = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    for name in sorted(WITHOUT_EFFECT.keys() & {f.name for f in fields(align.trl.DPOConfig)} - {"liger_kernel_config"}):
        align.trl.DPOConfig(**common, **{name: True})
        assert f"{name} has no effect: {WITHOUT_EFFECT[name]}" in caplog.text
    for name in REFUSED:
        with pytest.raises(UserError, match=f"{name}: "):
            align.trl.DPOConfig(**common, **{name: True})
    assert issubclass(align.trl.RewardConfig, AlignConfig)


def read_in(modules, owners=("args", "self.args")) -> set[str]:
    """Names that are read of `args` or `self.args`, by `getattr` too, anywhere in some modules' source."""
    found = set()
    for module in modules:
        for node in ast.walk(ast.parse(Path(import_module(module).__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners:
                found.add(node.attr)
            is_getattr = isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"
            if is_getattr and ast.unparse(node.args[0]) in owners:
                found.add(ast.literal_eval(node.args[1]))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_calls_honoured_is_read_and_what_has_no_effect_is_not(name):
    """A new field, or one that a change stops reading, cannot be called honoured."""
    own = {c.__module__ for c in getattr(align.trl, f"{name}Trainer").__mro__ if c.__module__.startswith("align.trl")}
    helps = {"align.trl.start", "align.trl.extra"} | (
        {"align.trl.losses", "align.trl.moving"} if name in ("DPO", "KTO") else set()
    )
    read = read_in(own | helps) | read_in(["align.trl.config"], ("args", "self"))
    inherited = {f.name for f in fields(TrainingArguments)}
    for field in [f for f in fields(getattr(align.trl, f"{name}Config")) if f.name not in inherited]:
        what, why = answer(name, field.name)
        assert what == "honoured" or why, field.name
        if what in ("honoured", "limited"):
            assert field.name in read, field.name
        elif field.name in WITHOUT_EFFECT:
            assert field.name not in read, field.name


GIVEN = {
    "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 4,
    "max_completion_length": 5,
    "max_prompt_length": 5,
    "chat_template_path": "some/other-model",
}


@pytest.mark.parametrize(("name", "field"), OF_ONE)
def test_what_one_trainer_does_otherwise_is_what_the_page_says(name, field, tiny_policy, tmp_path, caplog):
    what, why = answer(name, field)
    given = {"train_dataset": pairs(9), "processing_class": AutoTokenizer.from_pretrained(tiny_policy)}
    if what == "without effect":
        trainer("align.trl", name, tmp_path, str(tiny_policy), {field: GIVEN[field]}, **given)
        assert f"{field} has no effect: {why}" in caplog.text
        return
    with pytest.raises(UserError) as error:
        trainer("align.trl", name, tmp_path, str(tiny_policy), {field: GIVEN[field]}, **given)
    assert str(error.value) == f"{field}: {why}"
