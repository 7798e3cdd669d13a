"""Ranks by what the first lists show: each score in float64 by hand, and their sharing out against all ways of it."""

import itertools
import logging

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.errors import UserError
from align.model import starts
from align.model.adapters import Eva, Lora, RsLora
from align.model.by_part import why_whole
from align.model.config import PolicySection
from align.model.load import LoadOptions
from align.model.policy import load_policy
from align.model.ranks import shared_out
from align.packing.batch import collate

RANK, TARGETS = 3, ("q_proj", "down_proj")
NAMES = [f"model.layers.{n}.{own}" for n in (0, 1) for own in ("self_attn.q_proj", "mlp.down_proj")]


def likelihood(stats, batch):
    return -batch.to_lists(stats.logprobs.sum(dim=1)).sum(dim=1)


def ranks(policy):
    layers = dict(policy.model.get_base_model().named_modules())
    return {name: len(layers[name].lora_A["default"].weight) for name in NAMES}


def by_hand(gains):
    """The best of all ways to give four layers 12 ranks, 1 to 6 each."""
    ways = [way for way in itertools.product(range(1, 7), repeat=4) if sum(way) == 4 * RANK]
    best = max(ways, key=lambda way: sum(own[:k].sum() for own, k in zip(gains, way, strict=True)))
    return dict(zip(NAMES, best, strict=True))


@pytest.fixture
def load(model_folder, lists):
    batches = [collate(lists[:2], pad_id=2), collate(lists[2:], pad_id=2)]

    def load(adapter, loss=likelihood, **options):
        section = PolicySection(model=str(model_folder), adapter=adapter)
        return load_policy(section, LoadOptions(init_batches=batches, init_loss=loss, **options))

    return load


def exact(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def test_sensitivity_is_what_the_ranks_hold_of_the_gradients_squared_norm(load, model_folder, lists):
    model = exact(model_folder)
    for row in lists:
        for own in row["completion_ids"]:
            logits = model(torch.tensor([row["prompt_ids"] + own])).logits[0, len(row["prompt_ids"]) - 1 : -1]
            (-logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None]).sum()).backward()
    gains = [np.linalg.svd(model.get_submodule(name).weight.grad.numpy(), compute_uv=False) ** 2 for name in NAMES]
    policy = load(Lora(rank=RANK, targets=TARGETS, ranks="sensitivity"))
    assert ranks(policy) == by_hand(gains) != dict.fromkeys(NAMES, RANK)


def test_variance_is_what_the_ranks_hold_of_the_inputs_sum_of_squares(load, model_folder, lists, caplog):
    """Of every text's tokens but the last, which predicts nothing."""
    model, inputs = exact(model_folder), {name: [] for name in NAMES}
    for name in NAMES:
        keep = inputs[name].append
        model.get_submodule(name).register_forward_pre_hook(lambda module, given, keep=keep: keep(given[0][0]))
    with torch.no_grad():
        for row in lists:
            for own in row["completion_ids"]:
                model(torch.tensor([(row["prompt_ids"] + own)[:-1]]))
    singular = [np.linalg.svd(torch.cat(inputs[name]).numpy(), compute_uv=False) for name in NAMES]
    with caplog.at_level(logging.INFO, "align"):
        policy = load(Lora(rank=RANK, targets=TARGETS, ranks="variance"), loss=None)
    found = ranks(policy)
    assert found == by_hand([s**2 / (s**2).sum() for s in singular]) != dict.fromkeys(NAMES, RANK)
    assert f"ranks by variance, {min(found.values())} to {max(found.values())}" in caplog.text


@pytest.mark.parametrize(("kind", "power"), [(Lora, 0.0), (RsLora, 0.5)])
def test_all_layers_keep_the_scaling_but_rsloras_go_by_their_rank(kind, power, load):
    policy = load(kind(rank=RANK, alpha=12, targets=TARGETS, ranks="sensitivity"))
    layers = dict(policy.model.get_base_model().named_modules())
    for name, rank in ranks(policy).items():
        expected = 12 / RANK if not power else 12 / rank**power
        assert layers[name].scaling["default"] == pytest.approx(expected)


def test_what_is_equal_goes_to_earlier_layers_and_no_layer_gets_more_than_it_may():
    flat = {name: torch.ones(8) for name in NAMES}
    assert list(shared_out(flat, 10, 4).values()) == [4, 4, 1, 1]
    assert list(shared_out(flat | {NAMES[3]: torch.full((2,), 9.0)}, 10, 4).values()) == [4, 3, 1, 2]
    assert list(shared_out(flat, 99, 4).values()) == [4, 4, 4, 4]


def test_a_state_says_the_ranks_that_it_has(load, model_folder, tmp_path):
    adapter = Lora(rank=RANK, targets=TARGETS, ranks="sensitivity")
    policy = load(adapter)
    policy.save_state(tmp_path)
    again = load_policy(PolicySection(model=str(model_folder), adapter=adapter), LoadOptions(like=tmp_path))
    again.load_state(tmp_path)
    assert ranks(again) == ranks(policy)
    assert_close(dict(again.model.named_parameters()), dict(policy.model.named_parameters()))


def test_what_cannot_be_is_refused(load):
    with pytest.raises(ValueError, match="remove the patterns"):
        Lora(ranks="variance", rank_pattern={"q_proj": 2})
    with pytest.raises(UserError, match="quantised ones lack; take variance"):
        Lora(ranks="sensitivity").check_quantization("4bit")
    with pytest.raises(UserError, match="reward model takes lora, or ranks by variance"):
        load(Lora(rank=RANK, ranks="sensitivity"), loss=None)


def test_where_weights_are_cut_they_are_whole_first(model_folder):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    plain, by_rows = (PolicySection(model=str(model_folder), adapter=Lora(ranks=ranks)) for ranks in (None, "variance"))
    assert why_whole(plain, model_folder, base) is None
    assert why_whole(by_rows, model_folder, base) == "the adapter's start is computed from whole weights"


def test_eva_ends_where_its_directions_cannot_be_found(load, monkeypatch):
    """PEFT looks for them for ever."""
    with pytest.raises(UserError, match="eva looks for rank x rho = 200 directions .* have [0-9]+; give more rows"):
        load(Eva(rank=100, targets=TARGETS))
    monkeypatch.setattr(starts, "EVA_PASSES", 1)
    with pytest.raises(UserError, match="eva's directions do not settle in 1 passes over the first lists"):
        load(Eva(rank=2, targets=TARGETS))
