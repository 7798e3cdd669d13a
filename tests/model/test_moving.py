"""A reference that follows the policy (TR-DPO) beside the same averages of whole weights in float64."""

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import LlamaForCausalLM
from trl.trainer.callbacks import SyncRefModelCallback

from align.errors import UserError
from align.model.adapters import AdaLora, Dora, Full, Ia3, Lora, Miss, Olora, Pissa, RsLora
from align.model.attach import TRAINED
from align.model.config import PolicySection
from align.model.moving import MOVED_FILE, MOVING
from align.model.policy import load_policy
from align.packing.batch import collate
from align.training.train import train

EXAMPLE = {"prompt_ids": [1, 5, 6], "completion_ids": [[7, 8, 9], [10, 11]], "grades": [1.0, 0.0]}
HEAD = ("q_proj", "down_proj", "lm_head")


def moved(policy, scale: float = 0.3) -> None:
    """As if a step had been taken."""
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=scale)


def logprobs(policy, *, of_reference: bool) -> torch.Tensor:
    scorer, batch = policy.scorer(), policy.collate([EXAMPLE])
    with torch.no_grad():
        if not of_reference:
            return scorer(batch).logprobs
        with policy.reference():
            return scorer(batch).logprobs


class Dense:
    """Every weight of policy and reference whole, in float64."""

    def __init__(self, folder: Path) -> None:
        self.base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.reference = {name: p.detach().clone() for name, p in self.base.named_parameters()}

    def policy(self, policy) -> dict[str, torch.Tensor]:
        """The policy's whole weights: of a layer's own and its factors' product."""
        if not policy._layers:
            return {name: p.detach().double() for name, p in policy.model.named_parameters()}
        found = {}
        layers = {n.removeprefix("base_model.model."): m for n, m in policy.model.named_modules()}
        for name in self.reference:
            layer = layers[name.removesuffix(".weight")]
            if isinstance(layer, LoraLayer):
                a, b = layer.lora_A[TRAINED].weight.double(), layer.lora_B[TRAINED].weight.double()
                found[name] = layer.get_base_layer().weight.detach().double() + layer.scaling[TRAINED] * b @ a
            else:
                found[name] = layer.weight.detach().double()
        return {name: value.detach() for name, value in found.items()}

    def move(self, policy, mixture: float) -> None:
        own = self.policy(policy)
        self.reference = {n: mixture * own[n] + (1 - mixture) * old for n, old in self.reference.items()}

    def logprobs(self) -> torch.Tensor:
        self.base.load_state_dict(self.reference, strict=False)
        batch = collate([EXAMPLE], pad_id=0)
        with torch.no_grad():
            found = self.base(batch.input_ids).logits.log_softmax(-1).flatten(0, 1)
        own = found[batch.predict_at.clamp(min=0)].gather(2, batch.targets.clamp(min=0)[..., None])[..., 0]
        return own.masked_fill(~batch.completion_mask, 0)


@pytest.mark.parametrize("mixture", [0.3, 1.0])
@pytest.mark.parametrize(
    "adapter",
    [Lora(rank=3, alpha=5), RsLora(rank=3, alpha=5), Lora(rank=3, targets=HEAD), Pissa(rank=3), Olora(rank=3), Full()],
    ids=lambda a: f"{a.name} {'head' if getattr(a, 'targets', None) == HEAD else ''}",
)
def test_it_is_the_mean_of_whole_weights(tiny_policy, adapter, mixture):
    """Through nine moves: the factors' rank reaches the smaller side of every matrix (16, 8 of keys and values)."""
    policy, dense = load_policy(PolicySection(model=str(tiny_policy), adapter=adapter)), Dense(tiny_policy)
    policy.follow(every=2, mixture=mixture)
    start = logprobs(policy, of_reference=True)
    assert_close(start.double(), dense.logprobs(), rtol=0, atol=2e-5)
    for step in range(1, 19):
        moved(policy, 0.1)
        before = logprobs(policy, of_reference=True)
        policy.after_step(step)
        after = logprobs(policy, of_reference=True)
        if step % 2:
            assert torch.equal(before, after), "between two moves it stands still"
            continue
        dense.move(policy, mixture)
        assert_close(after.double(), dense.logprobs(), rtol=3e-5, atol=1e-4)
        assert not torch.equal(before, after)
        own = logprobs(policy, of_reference=False)
        (assert_close if mixture == 1 else assert_differs)(own, after, rtol=0, atol=1e-5)
    ranks = [(len(m.lora_A[MOVING].weight), min(m.in_features, m.out_features)) for m in layers_of(policy)]
    assert all(rank == (adapter.rank if mixture == 1 else smaller) for rank, smaller in ranks)


def assert_differs(a, b, **_) -> None:
    assert (a - b).abs().max() > 1e-3


def layers_of(policy) -> list:
    return [m for m in policy.model.modules() if isinstance(m, LoraLayer)]


def test_full_weights_move_as_trls_do(tiny_policy):
    policy = load_policy(PolicySection(model=str(tiny_policy), adapter=Full()))
    theirs = LlamaForCausalLM.from_pretrained(tiny_policy)
    policy.follow(every=1, mixture=0.6)
    for step in range(1, 6):
        moved(policy)
        policy.after_step(step)
        SyncRefModelCallback._sync_target_model(policy.model, theirs, 0.6)
    for (name, ours), other in zip(policy.frozen.named_parameters(), theirs.parameters(), strict=True):
        assert_close(ours, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("adapter", [Lora(rank=3), Pissa(rank=3)])
def test_an_adapter_gone_on_with_has_itself_as_its_start(tiny_policy, tmp_path, adapter):
    first = load_policy(PolicySection(model=str(tiny_policy), adapter=adapter))
    moved(first)
    first.save_adapter(tmp_path / "adapter")
    policy = load_policy(PolicySection(model=str(tiny_policy), start_adapter=str(tmp_path / "adapter")))
    dense = Dense(tiny_policy)
    dense.reference = dense.policy(policy)
    policy.follow(every=1, mixture=0.5)
    assert_close(logprobs(policy, of_reference=True).double(), dense.logprobs(), rtol=0, atol=1e-4)
    for step in (1, 2, 3):
        moved(policy, 0.1)
        policy.after_step(step)
        dense.move(policy, 0.5)
        assert_close(logprobs(policy, of_reference=True).double(), dense.logprobs(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("adapter", [Lora(rank=3), Pissa(rank=3), Full()])
def test_what_is_exported_does_not_know_of_it(tiny_policy, tmp_path, adapter):
    files = []
    for follows in (False, True):
        policy = load_policy(PolicySection(model=str(tiny_policy), adapter=adapter))
        if follows:
            policy.follow(every=1, mixture=0.5)
        for step in (1, 2):
            torch.manual_seed(step)
            moved(policy)
            policy.after_step(step)
        policy.save_adapter(tmp_path / str(follows))
        files.append(next((tmp_path / str(follows)).glob("*model.safetensors")).read_bytes())
    assert files[0] == files[1]


def metrics(path: Path) -> list[dict]:
    speed = ("seconds", "lists_per_second", "completion_tokens_per_second", "crc32")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in speed} for line in lines]


@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 4, "alpha": 8}, {"name": "pissa", "rank": 4}, "full"])
@pytest.mark.parametrize("objective", ["lambda", "kto"])
def test_a_run_that_is_gone_on_with_has_the_same_reference(make_recipe, tmp_path, monkeypatch, adapter, objective):
    """Stopped at a checkpoint, between two moves: the same weights and metrics to the last digit."""
    if objective == "kto" and adapter == "full":
        pytest.skip("the baseline is the same whatever trains")
    sections = {
        "policy": {"adapter": {"name": adapter} if isinstance(adapter, str) else adapter},
        "reference": {"name": "moving", "every": 3, "mixture": 0.7},
        "objective": {"name": objective},
    }
    whole = train(make_recipe("whole", **sections))
    from align.training import trainer as module

    real, stopped = module.AlignTrainer._save_checkpoint, []

    def stop(self, *arguments):
        real(self, *arguments)
        if self.state.global_step == 4 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(module.AlignTrainer, "_save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe("stopped", **sections))
    assert (tmp_path / "stopped" / "checkpoints" / "checkpoint-4" / MOVED_FILE).is_file()
    resumed = train(make_recipe("stopped", **sections))
    assert metrics(resumed.path) == metrics(whole.path)
    one, two = (next((p / "adapter").glob("*model.safetensors")) for p in (whole.path, resumed.path))
    assert all(torch.equal(tensor, load_file(two)[name]) for name, tensor in load_file(one).items())
    assert resumed.summary["eval_after"] == whole.summary["eval_after"]
    other = sections | {"reference": {"name": "initial"}}
    assert metrics(train(make_recipe("initial", **other)).path) != metrics(whole.path)


def test_training_computes_it_and_what_is_held_out_is_measured_by_its_start(make_recipe):
    """A hard update after every step: the policy then is its reference, so that the loss of pairs is ln 2 again."""
    sections = {
        "reference": {"name": "moving", "every": 1, "mixture": 1.0},
        "objective": {"name": "logistic"},
        "data": {"select": "best_worst"},
    }
    train_ = {"lists_per_step": 24, "schedule": "constant", "warmup_ratio": 0.0}
    result = train(make_recipe(**sections, train=train_ | {"steps": 3, "eval_steps": 1}))
    losses = [line["loss"] for line in metrics(result.path) if "loss" in line]
    assert losses == pytest.approx([0.693147] * 3, abs=1e-5)
    heldout = [line["eval_kl"] for line in metrics(result.path) if "eval_kl" in line]
    assert 1e-5 < heldout[0] < heldout[1] < heldout[2]
    assert "the reference moves" in (result.path / "events.log").read_text()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"policy": {"adapter": {"name": "dora"}}}, "reference: `moving` averages weights exactly, and dora is no sum"),
        ({"policy": {"adapter": {"name": "adalora", "rank": 2}}}, "adalora is no sum"),
        ({"policy": {"adapter": {"name": "miss"}}}, "miss is no sum"),
        ({"policy": {"adapter": {"name": "ia3"}}}, "ia3 is no sum"),
        ({"task": "sft", "objective": []}, "reference: no objective compares with one that moves"),
        ({"task": "reward", "objective": {"name": "bradley_terry"}}, "reference: no objective compares"),
        ({"score": {"name": "likelihood_mean"}, "objective": {"name": "logistic"}}, "reference: no objective compares"),
        (
            {"online": {"iterations": 2}, "rollout": {"reward": {"name": "length", "max": 9}, "completions": 2}},
            "online takes `online.reference: moving`",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(make_recipe, sections, message):
    with pytest.raises(UserError, match=message):
        make_recipe(reference={"name": "moving"}, **sections)


@pytest.mark.parametrize("adapter", [Dora(rank=2), Miss(rank=2), Ia3(), AdaLora(rank=2, initial_rank=3)])
def test_another_kind_of_adapter_is_refused_when_it_is_gone_on_with(tiny_policy, adapter):
    """`start_adapter` may name any; a recipe does not know of which kind."""
    from align.model.load import LoadOptions

    assert not adapter.averages
    policy = load_policy(PolicySection(model=str(tiny_policy), adapter=adapter), LoadOptions(total_steps=20))
    with pytest.raises(UserError, match="reference: moving averages weights, which is exact for `full`"):
        policy.follow(every=1, mixture=0.5)
