"""Frozen weights in autocast's dtype: the numbers that autocast gives without, and float32 where it must stay."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.model.adapters import Lora
from align.model.config import PolicySection
from align.model.forward import TokenScorer
from align.model.policy import load_policy
from align.model.precision import hold_frozen

HALF = torch.bfloat16


@pytest.fixture(params=["tied", "untied"])
def folder(request, model_folder, save_tokenizer, tmp_path):
    """A model whose weights bfloat16 holds, its head the embedding or not."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, tie_word_embeddings=request.param == "tied")
    model.to(HALF).float().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def load(folder):
    policy = load_policy(PolicySection(model=str(folder), adapter=Lora(rank=3)))
    torch.manual_seed(2)
    for name, parameter in sorted(policy.model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def run(policy, lists):
    policy.model.zero_grad()
    with torch.autocast("cpu", HALF):
        values = TokenScorer(policy)(policy.collate(lists)).logprobs
    values.sum().backward()
    return values.detach(), [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


def test_values_and_gradients_are_autocasts(folder, lists):
    policy = load(folder)
    expected, wanted = run(policy, lists)
    hold_frozen(policy.model, HALF)
    values, found = run(policy, lists)
    assert_close(values, expected, atol=0.02, rtol=0)  # the head's product sums over bfloat16 hidden states
    assert len(found) == len(wanted) == 28
    for gradient, want in zip(found, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - want).norm() <= 0.03 * want.norm()


def test_only_frozen_matrices_change_their_dtype(folder):
    policy = load(folder)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    hold_frozen(policy.model, HALF)
    for name, parameter in policy.model.named_parameters():
        frozen = not parameter.requires_grad and parameter.ndim == 2
        assert parameter.dtype == (HALF if frozen else torch.float32), name
        assert torch.equal(parameter.float(), before[name]), name
    tokens = torch.tensor([[1, 5]])
    assert policy.model.get_base_model().get_input_embeddings()(tokens).dtype == torch.float32


def test_an_embedding_that_would_be_rounded_stays(model_folder):
    policy = load(model_folder)
    embedding = policy.model.get_base_model().get_input_embeddings().weight
    before = embedding.detach().clone()
    hold_frozen(policy.model, HALF)
    assert embedding.dtype == torch.float32 and torch.equal(embedding, before)
