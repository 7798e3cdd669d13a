"""Layers that compute again: the same gradients, and as few of them as a budget asks for."""

import pytest
import torch

from align.model.adapters import Lora
from align.model.checkpointing import OnHost, checkpoint_layers, layers_to_checkpoint
from align.model.config import PolicySection
from align.model.forward import TokenScorer
from align.model.policy import load_policy

HIDDEN = 16


@pytest.fixture
def policy(model_folder):
    policy = load_policy(PolicySection(model=str(model_folder), adapter=Lora(rank=3)))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def gradients(policy, batch):
    policy.model.zero_grad()
    TokenScorer(policy).train()(batch).logprobs.sum().backward()
    return [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


def kept(policy, batch):
    """Bytes that a forward pass keeps, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        stats = TokenScorer(policy).train()(batch)
    assert stats.logprobs.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("count", [1, None])
def test_gradients_stay(policy, lists, count):
    batch = policy.collate(lists)
    wanted = gradients(policy, batch)
    checkpoint_layers(policy.model, count)
    found = gradients(policy, batch)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert any(gradient.any() for gradient in wanted)
    recomputed = [layer.gradient_checkpointing for layer in policy.model.get_base_model().model.layers]
    assert recomputed == [True, False]  # the last layer never


def test_the_budget_decides_how_many_layers(policy, lists):
    batch = policy.collate(lists)
    scorer, tokens = TokenScorer(policy).train(), 10 * batch.input_ids.numel()
    whole = 10 * kept(policy, batch)
    assert layers_to_checkpoint(scorer, batch, tokens=tokens, budget=whole) == 0
    assert layers_to_checkpoint(scorer, batch, tokens=tokens, budget=whole - 1) == 1
    assert layers_to_checkpoint(scorer, batch, tokens=tokens // 2, budget=whole / 2) == 0
    assert layers_to_checkpoint(scorer, batch, tokens=tokens) == 0  # of what is free here


def test_the_count_is_the_least_that_fits(model_folder, lists, monkeypatch):
    """needs(n) = (L - n) kept + n inputs + kept of one that computes again, for L layers of equal cost."""
    policy = load_policy(PolicySection(model=str(model_folder), adapter=Lora(rank=3)))
    scorer, batch = TokenScorer(policy).train(), policy.collate(lists)
    layers = [torch.nn.Identity() for _ in range(12)]
    monkeypatch.setattr("align.model.checkpointing._layers", lambda base: layers)
    tokens = batch.input_ids.numel()
    each, inputs = kept(policy, batch) / 12, tokens * HIDDEN * 4
    for n in range(2, 12):
        needs = (12 - n) * each + n * inputs + each
        assert layers_to_checkpoint(scorer, batch, tokens=tokens, budget=needs + 1) == n


@pytest.mark.parametrize("count", [0, None])
def test_activations_that_wait_on_the_host_give_the_same_gradients(policy, lists, count, monkeypatch):
    batch = policy.collate(lists)
    wanted = gradients(policy, batch)
    if count is None:
        checkpoint_layers(policy.model, count)
    monkeypatch.setattr("align.model.checkpointing.SMALL", 0)
    weights = {p.data_ptr() for p in policy.model.parameters()}
    moved = []
    own_empty = torch.empty

    def empty(*shape, **options):
        moved.append(own_empty(*shape, **options))
        return moved[-1]

    monkeypatch.setattr("align.model.checkpointing.torch.empty", empty)
    with OnHost(policy.model):
        found = gradients(policy, batch)
    assert moved and not weights & {x.data_ptr() for x in moved}
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
