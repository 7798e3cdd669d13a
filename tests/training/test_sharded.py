"""Weights cut over processes by FSDP2: the numbers of one process, checkpoints for any number, and what is refused."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from equal_runs import FULL, TRAIN, assert_equal_runs
from harm import HARMS, files_of
from torch import nn
from train_each import train_again
from transformers import LlamaConfig, LlamaForCausalLM

from align.errors import UserError
from align.model.by_part import read_parts, why_whole
from align.model.config import PolicySection
from align.model.sharding import tell_accelerate
from align.training.lamb import Lamb
from align.training.sharded import PARTS, load_optimizer, save_optimizer
from align.training.strategies import BY_NORM, ELEMENTWISE
from align.training.train import train

EXACT = ("lambda", "kto", "treg", "reward", "best", "parts", "parts_reward", "parts_padded")
PISSA = {"policy": {"adapter": {"name": "pissa", "rank": 4, "alpha": 8}}, "objective": {"name": "lambda"}}
WHOLE = "every process loads all of"
GOES_ON = ("lambda", "parts_padded")
"""A lora and full training."""


@pytest.mark.slow
def test_sharded_processes_equal_one(make_setting, start_each):
    """Two from the begin; runs that go on as 1 -> 2 and 2 -> 1, between whole and cut weights both ways."""
    ones = {name: train(make_setting(f"one_{name}", name)[0]).path for name in EXACT}
    begun = {name: make_setting(f"begun_{name}", name) for name in GOES_ON}
    for recipe, _ in begun.values():
        train(recipe)
    two = {name: make_setting(f"two_{name}", name) for name in EXACT}
    again = [f"{path}@2" for _, path in begun.values()]
    running = start_each("train_each", *(path for _, path in two.values()), *again, config="fsdp2")
    running.finish()
    assert WHOLE not in running.log.read_text()  # each process has read its part alone
    for name, (recipe, _) in (*two.items(), *begun.items()):
        assert_equal_runs(ones[name], Path(recipe.output))
    for name in GOES_ON:
        train_again(two[name][1], 2)
        assert_equal_runs(ones[name], Path(two[name][0].output))


def test_three_sharded_processes_equal_one(make_setting, start_each):
    """From the begin, and runs of two processes that go on as three and then, from what those wrote, as one."""
    names = {"lambda": "lambda", "parts_padded": "parts_padded", "reward": "parts_reward", "pissa": PISSA}
    ones = {name: train(make_setting(f"one_{name}", own)[0]).path for name, own in names.items()}
    begun = {name: make_setting(f"two_{name}", name) for name in GOES_ON}
    start_each("train_each", *(path for _, path in begun.values()), config="fsdp2").finish()
    three = {name: make_setting(f"three_{name}", names[name]) for name in ("pissa", "reward")}
    again = [f"{path}@2" for _, path in begun.values()]
    running = start_each("train_each", *(path for _, path in three.values()), *again, config="fsdp2", processes=3)
    running.finish()
    assert WHOLE in running.log.read_text()  # for pissa
    for name, (recipe, _) in (*three.items(), *begun.items()):
        assert_equal_runs(ones[name], Path(recipe.output))
    for name, (recipe, path) in begun.items():
        train_again(path, 2)  # written by two processes, and by three from step 4 on
        assert_equal_runs(ones[name], Path(recipe.output))


@pytest.mark.long
def test_optimizers_that_are_let_through_move_parts_as_wholes(make_setting, start_each):
    """And goes on with what a checkpoint of parts has of them."""
    rates = {"adadelta": 1.0, "sgd": 1e-2}
    names = [name for own in (ELEMENTWISE | BY_NORM).values() for name in own]
    settings = {n: FULL | {"train": TRAIN | {"optimizer": n, "learning_rate": rates.get(n, 1e-3)}} for n in names}
    ones = {name: train(make_setting(f"one_{name}", own)[0]).path for name, own in settings.items()}
    two = {name: make_setting(f"two_{name}", own) for name, own in settings.items()}
    paths = [path for _, path in two.values()]
    start_each("train_each", *paths, *(f"{path}@2" for path in paths), config="fsdp2").finish()
    for name, (recipe, _) in two.items():
        assert_equal_runs(ones[name], Path(recipe.output))


@pytest.mark.parametrize(("config", "processes"), [("hsdp", 4), ("fsdp2_offload", 2)])
def test_other_configurations_equal_one(make_setting, start_each, config, processes):
    one = train(make_setting("one", "parts_padded")[0]).path
    recipe, path = make_setting("many", "parts_padded")
    start_each("train_each", path, config=config, processes=processes).finish()
    assert_equal_runs(one, Path(recipe.output))


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if "grad_norm" in line for name in ("loss", "grad_norm")]


def test_a_damaged_part_of_one_process_is_passed_over_by_all(make_setting, start_each):
    recipe, path = make_setting("two", "lambda")
    run = Path(recipe.output)
    start_each("train_each", path, config="fsdp2").finish()
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    (run / "summary.json").unlink()
    newest = run / "checkpoints" / "checkpoint-4"
    assert {"optimizer/__0_0.distcp", "optimizer/__1_0.distcp", "rng_state_1.pth"} <= set(files_of(newest))
    HARMS["flipped"](newest / "optimizer" / "__1_0.distcp")
    start_each("train_each", path, config="fsdp2").finish()
    said = (run / "events.log").read_text()
    assert f"{newest} is passed over: {newest}/optimizer/__1_0.distcp: damaged" in said
    assert "goes on from step 2 of 4" in said
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_bfloat16_by_the_sharding_policy_gives_the_losses_of_autocast(make_setting, start_each):
    """Weights gathered in bfloat16, gradients summed and log-probabilities kept in float32."""
    half = {"train": TRAIN | {"precision": "bfloat16"}}
    held = {"full": {"adapter": {"name": "full"}}, "lora": {"dtype": "bfloat16"}}
    both = {n: [make_setting(f"{n}_{i}", half | {"policy": own}) for i in (1, 2)] for n, own in held.items()}
    for (one, _), _ in both.values():
        train(one)
    start_each("train_each", *(path for _, (_, path) in both.values()), config="fsdp2").finish()
    for (one, _), (two, _) in both.values():
        assert losses(Path(two.output)) == pytest.approx(losses(Path(one.output)), rel=0.03)


@pytest.mark.parametrize("cut", ["TP", "CP", "SP"])
def test_other_cuts_are_refused_by_name(monkeypatch, cut):
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{cut}_SIZE", "2")
    with pytest.raises(UserError, match=f"parallelism_config_{cut.lower()}_size: .*set it 1"):
        tell_accelerate("float32")


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as pytorch-optimizer's do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["lr"] = 0.1 / group["step"]
        return super().step(closure)


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize("kind", [Lamb, Counting])
def test_counts_that_are_no_tensors_go_on(tmp_path, kind, in_parts):
    """To the weights of steps without a stop."""
    model = nn.Linear(3, 4)
    whole = kind(model.parameters(), lr=0.1)

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    step(whole)
    step(whole)
    if in_parts:
        save_optimizer(whole, model, tmp_path)
    else:
        torch.save(whole.state_dict(), tmp_path / "optimizer.pt")
    before = copy.deepcopy(model.state_dict())
    step(whole)
    expected = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    again = kind(model.parameters(), lr=0.1)
    load_optimizer(again, model, tmp_path)
    step(again)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


class Hostile:
    """What runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def test_a_strangers_description_of_parts_runs_nothing(tmp_path):
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    save_optimizer(stepped(model), model, tmp_path)
    (tmp_path / PARTS / ".metadata").write_bytes(pickle.dumps(Hostile(f"touch {tmp_path}/ran")))
    with pytest.raises(UserError, match="no readable .metadata"):
        load_optimizer(optimizer, model, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_count_that_a_stranger_wrote_runs_nothing(tmp_path):
    model = nn.Linear(3, 4)
    optimizer = stepped(model)
    optimizer.state[model.weight]["step"] = Hostile(f"touch {tmp_path}/ran")
    save_optimizer(optimizer, model, tmp_path)
    with pytest.raises(UserError, match="holds what no checkpoint of an optimizer does; remove this checkpoint"):
        load_optimizer(optimizer, model, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_optimizers_parts_are_read_back_and_a_lost_one_is_said(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    written = stepped(model)
    save_optimizer(written, model, tmp_path)
    read = torch.optim.AdamW(model.parameters(), lr=0.1)
    load_optimizer(read, model, tmp_path)
    for parameter in model.parameters():
        assert read.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in written.state[parameter].items():
            assert torch.equal(read.state[parameter][name], value)
    (part,) = (tmp_path / PARTS).glob("*.distcp")
    os.truncate(part, part.stat().st_size - 1)
    with pytest.raises(UserError, match=f"{part.name}: this part of the checkpoint is missing or incomplete"):
        load_optimizer(read, model, tmp_path)
    part.unlink()
    with pytest.raises(UserError, match=f"{part.name}: this part"):
        load_optimizer(read, model, tmp_path)
    (tmp_path / PARTS / ".metadata").unlink()
    with pytest.raises(UserError, match="no readable .metadata"):
        load_optimizer(read, model, tmp_path)


@pytest.mark.parametrize(
    ("said", "section", "settings"),
    [
        (None, {}, {}),
        (None, {"adapter": {"name": "full"}}, {"tie_word_embeddings": True}),
        ("whole weights", {"adapter": {"name": "pissa"}}, {}),
        ("whole weights", {"start_adapter": "somewhere"}, {}),
        ("otherwise than transformers does, model.layers.2.", {}, {"num_hidden_layers": 3}),
        ("hold model.embed_tokens.weight in another shape", {}, {"vocab_size": 41}),
    ],
)
def test_a_part_alone_is_read_where_that_gives_the_same_weights(save_llama, tmp_path, said, section, settings):
    folder = save_llama(tmp_path, **({} if said else settings))
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, **settings))
    reason = why_whole(PolicySection.model_validate({"model": str(folder), **section}), folder, empty)
    assert reason == said or (said is not None and said in str(reason))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_read_by_slices_are_those_of_the_files(save_llama, tmp_path, tied):
    folder = save_llama(tmp_path, tie_word_embeddings=tied)
    with init_empty_weights(include_buffers=False):
        base = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    base.tie_weights()
    read_parts(base, folder)
    expected = LlamaForCausalLM.from_pretrained(folder).state_dict()
    for name, value in base.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
