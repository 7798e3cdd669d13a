"""Offsets of chosen heads against a plain model with hooks that add them, and the choice in float64 by hand."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.beft.layer import BeftLayer
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.errors import UserError
from align.model.config import PolicySection
from align.model.forward import TokenScorer, score_tokens
from align.model.load import LoadOptions
from align.model.middle_adapters import Lofit
from align.model.policy import load_policy
from align.packing.batch import collate

WIDTH, HEADS = 8, 2
"""Of the tiny model's heads; each of its two layers has as many."""


def likelihood(stats, batch):
    return -batch.to_lists(stats.logprobs.sum(dim=1)).sum(dim=1)


@pytest.fixture
def load(model_folder, batch):
    def load(adapter, **options):
        section = PolicySection(model=str(model_folder), adapter=adapter)
        return load_policy(section, LoadOptions(**{"init_batches": [batch], "init_loss": likelihood} | options))

    return load


def with_offsets(model, offsets):
    """Add to what each layer's heads give."""
    for layer, offset in zip(model.model.layers, offsets, strict=True):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, given, own=offset: (given[0] + own,))


def offset_layers(policy):
    layers = policy.model.get_base_model().model.layers
    return [layer.self_attn.o_proj for layer in layers]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_heads_are_those_by_whose_offsets_the_gradient_is_largest(count, load, model_folder, lists):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    offsets = [torch.zeros(WIDTH * HEADS, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with_offsets(model, offsets)
    for row in lists:
        for own in row["completion_ids"]:
            logits = model(torch.tensor([row["prompt_ids"] + own])).logits[0, len(row["prompt_ids"]) - 1 : -1]
            (-logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None]).sum()).backward()
    norms = {
        (n, h): own.grad.view(HEADS, WIDTH)[h].norm().item() for n, own in enumerate(offsets) for h in range(HEADS)
    }
    expected = sorted(sorted(norms, key=norms.get)[-count:])
    policy = load(Lofit(share=count / 4))
    weights = [layer.self_attn.o_proj.weight.float() for layer in model.model.layers]
    for n, layer in enumerate(offset_layers(policy)):
        heads = [h for m, h in expected if m == n]
        assert isinstance(layer, BeftLayer if heads else nn.Linear)
        if heads:
            columns = torch.cat([torch.arange(h * WIDTH, (h + 1) * WIDTH) for h in heads])
            assert_close(layer.beft_bias["default"].outer, weights[n][:, columns])
            assert layer.beft_bias["default"].middle.numel() == WIDTH * len(heads)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == WIDTH * count
    assert all(p.grad is None for p in policy.model.parameters())


def test_an_offset_is_added_to_what_the_heads_give_and_is_exported_as_pefts(load, model_folder, batch, tmp_path):
    policy = load(Lofit(share=1.0))
    plain = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    offsets = [torch.randn(WIDTH * HEADS) for _ in range(2)]
    with_offsets(plain, offsets)
    with torch.no_grad():
        for layer, offset in zip(offset_layers(policy), offsets, strict=True):
            layer.beft_bias["default"].middle.copy_(offset[:, None])
        expected = score_tokens(plain, batch).logprobs
        assert_close(TokenScorer(policy).eval()(batch).logprobs, expected, atol=1e-5, rtol=0)
        policy.save_adapter(tmp_path)
        exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path).eval()
        assert_close(score_tokens(exported, batch).logprobs, expected, atol=1e-5, rtol=0)


def test_a_state_says_which_heads_it_has(load, batch, tmp_path):
    policy = load(Lofit(share=0.25))
    with torch.no_grad():
        for parameter in (p for p in policy.model.parameters() if p.requires_grad):
            parameter.normal_()
        for layer in (own for own in offset_layers(policy) if isinstance(own, BeftLayer)):  # as of other heads
            layer.beft_bias["default"].outer.copy_(layer.get_base_layer().weight[:, WIDTH:])
    policy.save_state(tmp_path)
    again = load(Lofit(share=0.25), init_batches=None, init_loss=None, like=tmp_path)
    again.load_state(tmp_path)
    with torch.no_grad():
        found, expected = (TokenScorer(own).eval()(batch).logprobs for own in (again, policy))
    assert torch.equal(found, expected)


def test_what_has_no_heads_gradients_or_whole_weights_is_refused(load):
    with pytest.raises(UserError, match=r"targets: model.layers.0.mlp.down_proj does not read heads"):
        load(Lofit(targets=("down_proj",)))
    with pytest.raises(UserError, match="gradient of a policy's loss"):
        load(Lofit(), init_loss=None)
    with pytest.raises(UserError, match="whole weights"):
        Lofit().check_quantization("4bit")


def test_packed_rows_have_the_offsets_too(load, lists):
    policy = load(Lofit(share=0.75))
    assert policy.packing
    with torch.no_grad():
        for parameter in (p for p in policy.model.parameters() if p.requires_grad):
            parameter.normal_()
        found, expected = (
            TokenScorer(policy).eval()(own).logprobs for own in (policy.collate(lists), collate(lists, pad_id=2))
        )
    assert_close(found, expected, atol=1e-5, rtol=0)
