"""What may change on a begun run: keys that do not change what it gives, and its length where that is the same run."""

import shutil
import weakref
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch.testing import assert_close

from align.errors import UserError
from align.model import policy as policy_module
from align.recipe import Recipe, load_recipe
from align.runs.checkpoints import numbered
from align.runs.run_directory import RunDirectory
from align.section import Free, Grows
from align.training.train import train
from align.training.trainer import AlignTrainer

SGD = {"optimizer": "sgd", "learning_rate": 0.1}

SAME_BYTES = {
    "train.logging_steps": 3,
    "train.eval_steps": 1,
    "train.save_steps": 1,
    "train.keep_checkpoints": 5,
    "train.report_to": [],  # none is installed with the tests
    "train.project": "other",
    "train.time_limit": "1d",
    "train.on_bad_step": "skip",
    "sampling.show": 0,
    "data.workers": 2,
    "data.cache": False,
    "data.stop_on": ["refusals"],
    "reference.cache_dir": "other_cache",
    "output": "",  # spelt otherwise
}
"""Keys that leave the adapter as it is to the last bit."""
SAME_SUM = {
    "train.tokens_per_batch": 60,
    "train.packing": False,
    "train.gradient_checkpointing": True,
    "train.activation_memory_gb": 1.0,
    "train.threads": 2,
}
"""Keys that change the order in which numbers are added."""
ON_A_GPU = {"train.activation_offload"}
"""Refused on a CPU; tests/model/test_checkpointing.py holds its gradients."""
OF_ROLLOUTS = {f"rollout.agreement_{key}" for key in ("prompts", "bound")} | {
    f"rollout.engine.{key}"
    for key in ["tokens_per_batch", "cache_gib", "while_training", "timeout", "urls", "concurrency", "tries", "api_key"]
}
"""Keys of the engine that samples, which decide when and where, not what."""
OF_SCORERS = {
    f"{place}.tokens_per_batch"
    for place in ("rollout.reward", "sampling.reward", "rollout.decoding.reward", "rollout.decoding.baseline_reward")
}
"""Of a scorer's passes; rewards do not depend on them."""
GROW = {"train.steps", "train.epochs", "online.iterations"}


def marked(section: type[BaseModel], mark: type, path: str = "") -> set[str]:
    """Dotted keys with a mark, of every kind of section that a key can hold."""
    found = set()
    for name, field in section.model_fields.items():
        if any(isinstance(one, mark) for one in field.metadata):
            found.add(path + name)
        for kind in _classes(field.annotation):
            found |= marked(kind, mark, f"{path}{name}.")
    return found


def _classes(annotation) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [kind for part in get_args(annotation) for kind in _classes(part)]


def test_every_free_key_is_tried_here():
    assert marked(Recipe, Free) == SAME_BYTES.keys() | SAME_SUM.keys() | ON_A_GPU | OF_ROLLOUTS | OF_SCORERS
    assert marked(Recipe, Grows) == GROW


class Killed(BaseException):
    pass


def killed(recipe, step: int) -> Path:
    """A run that ends in the middle of a step."""
    original = AlignTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AlignTrainer, "training_step", training_step)
        train(recipe)
    return Path(recipe.output)


def changed(recipe: Recipe, keys: dict, folder: Path) -> Recipe:
    """The recipe with other values, as a user's file says it."""
    values = dict(keys)
    if "output" in values:
        values["output"] = f"{recipe.output}/../{Path(recipe.output).name}"
    if "reference.cache_dir" in values:
        values["reference.cache_dir"] = str(folder / "other_cache")
    return load_recipe(Path(recipe.output) / "recipe.yaml", [f"{key}={value}" for key, value in values.items()])


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter" / "adapter_model.safetensors")


def test_keys_that_do_not_change_the_result_may_change_on_a_begun_run(make_recipe, tmp_path):
    dropout = {"policy": {"adapter": {"name": "lora", "rank": 4, "dropout": 0.1}}}  # whose random numbers must not move
    whole = train(make_recipe("whole", **dropout))
    begun = make_recipe("begun", **dropout)
    run = killed(begun, 5)
    resumed = train(changed(begun, SAME_BYTES, tmp_path))
    assert (whole.path / "adapter" / "adapter_model.safetensors").read_bytes() == (
        run / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert resumed.summary["eval_after"] == whole.summary["eval_after"]
    events = (run / "events.log").read_text()
    assert "train.logging_steps is 3 from here on (1 before)" in events and "sampling.show is 0" in events


def test_keys_that_cut_the_work_otherwise_give_the_same_sums(make_recipe, tmp_path):
    whole = train(make_recipe("whole", train=SGD))
    begun = make_recipe("begun", train=SGD)
    run = killed(begun, 5)
    train(changed(begun, SAME_SUM, tmp_path))
    torch.set_num_threads(1)
    for name, tensor in tensors(whole.path).items():
        assert_close(tensors(run)[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_key_that_counts_beside_another_is_refused_there(make_recipe):
    best = {"eval_steps": 2, "keep_best": "loss"}
    killed(make_recipe(train=best), 5)
    with pytest.raises(UserError, match=r"another recipe \(it differs in train.eval_steps\)"):
        train(make_recipe(train=best | {"eval_steps": 1}))


CONSTANT = {"schedule": "constant", "save_steps": 2}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt"])
def test_a_run_grows_into_the_longer_one(make_recipe, finished, schedule):
    options = CONSTANT | {"schedule": schedule, "warmup_ratio": 0.0}
    whole = train(make_recipe("whole", train=options | {"steps": 9}))
    short = make_recipe("grown", train=options | {"steps": 5})
    train(short) if finished else killed(short, 3)
    grown = train(make_recipe("grown", train=options | {"steps": 9}))
    assert grown.summary["steps"] == 9 and grown.summary["eval_before"] == whole.summary["eval_before"]
    assert "the run grows from 5 to 9 steps" in (grown.path / "events.log").read_text()
    for name, tensor in tensors(whole.path).items():
        assert torch.equal(tensors(grown.path)[name], tensor)
    lines = [[line["loss"] for line in RunDirectory(r.path).read_metrics()] for r in (whole, grown)]
    assert lines[0] == lines[1]
    with pytest.raises(UserError, match=r"differs in train.steps\); train.steps may only grow"):
        train(short)


def test_epochs_whose_last_step_was_smaller_grow_from_the_step_before(make_recipe):
    """24 lists are two steps of 10 and one of 4; twice as many epochs have 10 in the third."""
    options = CONSTANT | {"lists_per_step": 10, "save_steps": 1, "keep_checkpoints": 2}
    whole = train(make_recipe("whole", train=options | {"epochs": 2}))
    train(make_recipe("grown", train=options | {"epochs": 1}))
    grown = train(make_recipe("grown", train=options | {"epochs": 2}))
    for name, tensor in tensors(whole.path).items():
        assert torch.equal(tensors(grown.path)[name], tensor)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_schedule_that_depends_on_the_length_does_not_grow(make_recipe, schedule):
    options = {"schedule": schedule, "warmup_ratio": 0.5, "save_steps": 2}
    run = train(make_recipe(train=options | {"steps": 4})).path
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match=f"may not grow from 4 to 8 steps: the learning rate of a {schedule} schedule"):
        train(make_recipe(train=options | {"steps": 8}))
    assert (run / "summary.json").exists() and (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    train(make_recipe(train=options | {"steps": 4}))


def test_adalora_does_not_grow(make_recipe):
    adapter = {"policy": {"adapter": {"name": "adalora", "rank": 2, "initial_rank": 4}}}
    train(make_recipe(train=CONSTANT | {"steps": 12}, **adapter))
    with pytest.raises(UserError, match="adalora plans its ranks by the number of steps"):
        train(make_recipe(train=CONSTANT | {"steps": 14}, **adapter))


def test_a_checkpoint_of_a_grown_run_is_the_newest(make_recipe):
    train(make_recipe("grown", train=CONSTANT | {"lists_per_step": 10, "save_steps": 1, "epochs": 1}))
    folder = RunDirectory(make_recipe("grown").output).checkpoints
    shutil.copytree(folder, folder.parent / "copy")
    assert [path.name for path in numbered(folder)] == ["checkpoint-2", "checkpoint-3"]
    RunDirectory(folder.parent).grow(make_recipe("grown"), folder / "checkpoint-2")
    assert [path.name for path in numbered(folder)] == ["checkpoint-2"]


LACKS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("place", LACKS)
def test_a_lack_of_memory_is_one_sentence_and_the_run_goes_on_with_half(make_recipe, monkeypatch, place):
    whole = train(make_recipe("whole", train=SGD | {"tokens_per_batch": 120}))
    original = AlignTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 5 and self.tokens_per_batch > 60:
            raise LACKS[place]
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AlignTrainer, "training_step", training_step)
    said = r"passes of up to 120 tokens: call again with train.tokens_per_batch=60, or .* it goes on from step 4$"
    with pytest.raises(UserError, match=said):
        train(make_recipe("begun", train=SGD | {"tokens_per_batch": 120}))
    run = train(make_recipe("begun", train=SGD | {"tokens_per_batch": 60})).path
    for name, tensor in tensors(whole.path).items():
        assert_close(tensors(run)[name], tensor, rtol=1e-4, atol=1e-6)


def lacks_above(monkeypatch, tokens: int, *steps: int) -> list[int]:
    """Memory that lacks in some steps while passes may be larger; returns, as it fills, the tokens of every attempt."""
    original, attempts = AlignTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        if self.state.global_step in steps and self.tokens_per_batch > tokens:
            attempts.append(self.tokens_per_batch)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AlignTrainer, "training_step", training_step)
    return attempts


@pytest.mark.parametrize("step", [0, 5])
def test_auto_halves_until_it_fits_and_gives_the_same_bytes(make_recipe, monkeypatch, step):
    """Every pass here is below 1024 tokens, so that each of the halves cuts the lists in one and the same way."""
    dropout = {"policy": {"adapter": {"name": "lora", "rank": 4, "dropout": 0.1}}}  # whose random numbers must not move
    whole = train(make_recipe("whole", **dropout))
    attempts = lacks_above(monkeypatch, 1024, step)
    halved = train(make_recipe("halved", train={"tokens_per_batch": "auto"}, **dropout))
    assert attempts == [8192, 4096, 2048]
    names = ("adapter/adapter_model.safetensors",)
    assert [(halved.path / n).read_bytes() for n in names] == [(whole.path / n).read_bytes() for n in names]
    assert halved.summary["eval_after"] == whole.summary["eval_after"]
    lines = [[line["loss"] for line in RunDirectory(run.path).read_metrics()] for run in (whole, halved)]
    assert lines[0] == lines[1]
    events = (halved.path / "events.log").read_text()
    place = "goes on from step 4" if step else "begins again"
    assert events.count("out of memory") == 3 and f"so it {place} with 1024, which does not" in events
    assert load_recipe(halved.path / "recipe.yaml").train.tokens_per_batch == "auto"


def test_auto_frees_what_the_attempt_held_before_it_loads_again(make_recipe, monkeypatch):
    models, alive = [], []
    original = policy_module.load_model

    def load(*args, **kwargs):
        alive.append(sum(model() is not None for model in models))
        found = original(*args, **kwargs)
        models.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(policy_module, "load_model", load)
    lacks_above(monkeypatch, 2048, 2)
    train(make_recipe(train={"tokens_per_batch": "auto"}))
    assert alive == [0, 0, 0]


def test_auto_gives_the_same_sums_where_a_half_cuts_otherwise(make_recipe, monkeypatch):
    whole = train(make_recipe("whole", train=SGD))
    monkeypatch.setattr("align.runs.memory.FLOOR", 60)
    attempts = lacks_above(monkeypatch, 80, 3, 6)
    halved = train(make_recipe("halved", train=SGD | {"tokens_per_batch": "auto"}))
    assert attempts == [8192, 4096, 2048, 1024, 512, 256, 128]
    for name, tensor in tensors(whole.path).items():
        assert_close(tensors(halved.path)[name], tensor, rtol=1e-4, atol=1e-6)


def test_auto_goes_on_in_a_run_that_grows(make_recipe, monkeypatch):
    options = CONSTANT | {"warmup_ratio": 0.0}
    whole = train(make_recipe("whole", train=options | {"steps": 9}))
    train(make_recipe("grown", train=options | {"steps": 5}))
    attempts = lacks_above(monkeypatch, 2048, 8)
    grown = train(make_recipe("grown", train=options | {"steps": 9, "tokens_per_batch": "auto"}))
    assert attempts == [8192, 4096]
    assert (grown.path / "events.log").read_text().count("so it goes on from step 8") == 2
    for name, tensor in tensors(whole.path).items():
        assert torch.equal(tensors(grown.path)[name], tensor)


def test_auto_ends_in_the_sentence_where_memory_is_short_for_another_reason(make_recipe, monkeypatch):
    attempts = lacks_above(monkeypatch, 0, 5)
    said = r"passes of up to 256 tokens: call again with train.tokens_per_batch=128, or train.gradient_checkpointing"
    with pytest.raises(UserError, match=said):
        train(make_recipe(train={"tokens_per_batch": "auto"}))
    assert attempts == [8192, 4096, 2048, 1024, 512, 256]


def test_another_error_stays_what_it_is(make_recipe, monkeypatch):
    def training_step(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(AlignTrainer, "training_step", training_step)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        train(make_recipe())
