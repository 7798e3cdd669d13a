"""Every kind of PEFT's: it starts as its reference, trains itself alone, and is what is saved, exported and merged."""

import importlib.util
import math

import peft
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from small_kinds import SMALL
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.errors import UserError
from align.losses.list_loss import build_loss
from align.model.adapters import AdaLora, Eva, Ia3, Lora, Miss, Pissa
from align.model.config import PolicySection
from align.model.forward import TokenScorer, score_tokens
from align.model.load import LoadOptions
from align.model.peft_adapter import Peft
from align.model.peft_kinds import KINDS
from align.model.policy import load_policy
from align.model.reference import check_reference_identity
from align.objectives.pairwise import Logistic
from align.objectives.scores import LogRatio
from align.packing.batch import collate

TRAINS = [name for name, kind in KINDS.items() if not kind.why_not and not kind.instead]
TARGETS = ("q_proj", "o_proj", "down_proj")
PAIRS = [
    {"prompt_ids": [1, 9, 4], "completion_ids": [[5, 6, 7, 3], [8, 9]], "grades": [1.0, 0.0]},
    {"prompt_ids": [1, 9, 4, 6], "completion_ids": [[7, 5, 11], [7, 12, 6]], "grades": [0.0, 1.0]},
]


def adapter_of(kind: str, **keys) -> Peft:
    targets = TARGETS if KINDS[kind].linear else None
    return Peft(**{"type": kind, "options": SMALL.get(kind, {"r": 4}), "targets": targets} | keys)


@pytest.fixture(scope="module")
def load(model_folder):
    def load(adapter, **section):
        section = PolicySection(model=str(model_folder), adapter=adapter, **section)
        return load_policy(section, LoadOptions(total_steps=6))

    return load


def logprobs(policy, batch):
    with torch.no_grad():
        return TokenScorer(policy).eval()(batch).logprobs


def dpo(policy, batch, reference):
    loss = build_loss(LogRatio(beta=0.1), [Logistic()])
    return loss(TokenScorer(policy).train()(batch), reference, batch).mean()


def test_the_table_is_of_the_peft_that_is_installed():
    registry = {own.value: config for own, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert registry.keys() == KINDS.keys(), "a kind is new or gone: try it, and say in the table what it needs"
    for name, config in registry.items():
        assert issubclass(config, peft.PromptLearningConfig) == ("tokens of its own" in KINDS[name].why_not), name


@pytest.mark.parametrize("kind", TRAINS)
def test_it_starts_as_its_reference_and_is_what_is_saved_exported_and_merged(kind, load, model_folder, tmp_path):
    if kind == "ADAMSS" and importlib.util.find_spec("sklearn") is None:
        with pytest.raises(UserError, match="pip install scikit-learn"):
            load(adapter_of(kind))
        return
    adapter, policy = adapter_of(kind), load(adapter_of(kind))
    batch = collate(PAIRS, pad_id=2)
    check_reference_identity(policy, batch)
    with policy.reference():
        reference = TokenScorer(policy)(batch).logprobs
    base = score_tokens(AutoModelForCausalLM.from_pretrained(model_folder), batch).logprobs.detach()
    if not KINDS[kind].moved:
        assert_close(reference, base, atol=1e-5, rtol=0)
    assert dpo(policy, batch, reference).item() == pytest.approx(math.log(2), abs=1e-6)

    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(2):
        dpo(policy, batch, reference).backward()
        optimizer.step()
        optimizer.zero_grad()
    own = logprobs(policy, batch)
    assert (own - reference).abs().max() > 1e-4, "it has moved"
    with policy.reference():
        assert torch.equal(TokenScorer(policy)(batch).logprobs, reference)
    places = {p.data_ptr() for p in trained}  # some kinds name one tensor in several layers
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, before[name]) or value.data_ptr() in places, f"{name} is not the adapter's"

    assert policy.packing
    packed = policy.collate(PAIRS)
    assert_close(logprobs(policy, packed)[packed.completion_mask], own[batch.completion_mask], atol=1e-5, rtol=0)

    policy.save_state(tmp_path / "state")
    again = load(adapter)
    again.load_state(tmp_path / "state")
    assert torch.equal(logprobs(again, batch), own)

    policy.save_adapter(tmp_path / "adapter")
    exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter")
    assert_close(score_tokens(exported.eval(), batch).logprobs.detach(), own, atol=1e-5, rtol=0)
    if kind == "BEFT":  # this model's layers have no biases
        with pytest.raises(ValueError, match="no bias"):
            exported.merge_and_unload()
    else:
        merged = exported.merge_and_unload()
        assert_close(score_tokens(merged, batch).logprobs.detach(), own, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(name, own.why_not.split(",")[0].split(";")[0]) for name, own in KINDS.items() if own.why_not]
    + [("adalora", "take {name: adalora}")],
)
def test_a_kind_that_cannot_train_here_is_refused_when_the_recipe_is_read(kind, message):
    with pytest.raises(ValidationError, match=message):
        Peft(type=kind)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Peft(type="NOTHING"), "PEFT knows no type NOTHING; it has .*LOHA"),
        (Peft(type="loha", options={"rank": 3}), "LOHA has no option `rank`; it has rank_"),
        (Peft(type="LORA", options={"init_lora_weights": "pissa"}), "take pissa"),
        (Peft(type="LORA", options={"bias": "all"}), "biases"),
        (Peft(type="C3A", options={"block_size": 4, "init_weights": False}), "does not start as the base"),
        (Peft(type="LN_TUNING", layers=(0,)), "name these too"),
        (Lora(layers=(0, 2)), "none has the number 2; they are 0 to 1"),
        (Lora(exclude=("no_proj",)), "none of its layers is named no_proj"),
        (Lora(targets=("q_proj",), exclude=("q_proj",)), "leaves no layer"),
        (Lora(rank_pattern={"no_proj": 3}), "names no_proj, and no layer of it"),
        (Lora(rank_pattern={"(": 3}), "does not fit"),
        (Pissa(rank=3, rank_pattern={"q_proj": 17}), "17 is more than .*q_proj has directions; give at most 16"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_in_a_sentence(load, adapter, message):
    with pytest.raises(UserError, match=message):
        check_reference_identity(load(adapter), collate(PAIRS, pad_id=2))


def test_eva_takes_no_ranks_of_layers():
    with pytest.raises(ValidationError, match="eva gives every layer a rank"):
        Eva(rank_pattern={"q_proj": 3})


@pytest.mark.parametrize(
    "adapter",
    [Lora(rank=3), AdaLora(rank=2, initial_rank=4), Miss(rank=4), Ia3(targets="all-linear"), Peft(type="LOHA")],
)
def test_layers_and_exclude_choose_among_the_targets(load, adapter):
    chosen = adapter.model_copy(update={"layers": (1,), "exclude": ("o_proj", "mlp.up_proj")})
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "down_proj")
    found = {n for n, m in load(chosen).model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)}
    assert {name.split("layers.")[1] for name in found} == {
        f"1.{'mlp' if name in names[3:] else 'self_attn'}.{name}" for name in names
    }


@pytest.mark.parametrize("adapter", [Lora, Pissa])
def test_layers_have_the_ranks_and_scales_of_their_patterns_and_an_export_one_scale_for_all(
    adapter, load, model_folder, tmp_path
):
    made = adapter(rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.mlp.up_proj": 12})
    policy, batch = load(made), collate(PAIRS, pad_id=2)
    layers = {name.split("model.model.")[1]: m for name, m in policy.model.named_modules() if hasattr(m, "lora_A")}
    expected = {"q_proj": (2, 8 / 2), "layers.0.mlp.up_proj": (4, 12 / 4)}
    for name, layer in layers.items():
        own = next((found for key, found in expected.items() if name.endswith(key)), (4, 8 / 4))
        assert (layer.lora_A["default"].weight.shape[0], layer.scaling["default"]) == own, name
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    own = logprobs(policy, batch)
    policy.save_adapter(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path)
    assert_close(score_tokens(again.eval(), batch).logprobs.detach(), own, atol=1e-5, rtol=0)
    assert {m.scaling["default"] for m in again.modules() if hasattr(m, "lora_A")} == {8 / 4}
    assert made.served_rank() == max(again.peft_config["default"].rank_pattern.values())
