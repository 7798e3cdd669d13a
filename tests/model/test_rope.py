"""Rotary embeddings that follow the longest sequence of a pass: every sequence is computed as if it were alone."""

import logging

import pytest
import torch
import transformers as t
from small_configs import SMALL
from torch.testing import assert_close

from align.errors import UserError
from align.model.adapters import Full, Lora
from align.model.config import PolicySection
from align.model.forward import TokenScorer
from align.model.load import LoadOptions
from align.model.policy import load_policy
from align.model.reward import RewardScorer, load_reward_model
from align.packing.batch import collate
from align.packing.rope import fix_frequencies, regimes
from rewards import load_scorer

LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.2, 1.5, 2.0]}
LONG |= {"long_factor": [1.0, 3.0, 8.0, 20.0], "original_max_position_embeddings": 8, "factor": 8.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CONFIGS = {
    "llama, dynamic NTK": lambda: t.LlamaConfig(**SMALL, max_position_embeddings=8, rope_parameters=DYNAMIC),
    "mistral, dynamic NTK": lambda: t.MistralConfig(**SMALL, max_position_embeddings=8, rope_parameters=DYNAMIC),
    "phi3, longrope": lambda: t.Phi3Config(
        **SMALL, max_position_embeddings=64, original_max_position_embeddings=8, rope_parameters=LONG
    ),
    "llama, longrope": lambda: t.LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=LONG),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path, save_tokenizer):
    torch.manual_seed(5)
    t.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def alone(folder, lists):
    """Every completion's log-probabilities by a fresh model, which has seen nothing else."""
    values, models = [], []
    for example in lists:
        for ids in example["completion_ids"]:
            model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            prompt = example["prompt_ids"]
            logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            values.append(logits.log_softmax(-1)[range(len(ids)), ids])
            models.append(model)
    return torch.cat(values), models


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_policy_reference_and_gradients_are_those_of_every_row_alone(folder, ragged, packing):
    longest = {"prompt_ids": [1, 5, 6], "completion_ids": [list(range(7, 19))], "grades": [0.0]}
    ragged = [longest, *ragged]  # whose frequencies must not stay for the next ones
    assert {len(e["prompt_ids"]) + len(ids) > 8 for e in ragged for ids in e["completion_ids"]} == {True, False}
    policy = load_policy(PolicySection(model=str(folder), adapter=Full()), LoadOptions(packing=packing))
    assert policy.packing == packing
    batch, scorer = policy.collate(ragged), TokenScorer(policy).train()
    expected, models = alone(folder, ragged)
    for _ in range(2):  # an earlier pass must not matter
        values = scorer(batch).logprobs[batch.completion_mask]
        assert_close(values, expected, atol=1e-5, rtol=0)
        with policy.reference():
            assert_close(scorer(batch).logprobs[batch.completion_mask], expected, atol=1e-5, rtol=0)
    weights = torch.randn(len(expected))
    (weights * values).sum().backward()
    (weights * expected).sum().backward()
    for name, parameter in policy.model.named_parameters():
        want = sum(dict(model.named_parameters())[name].grad for model in models)
        assert (parameter.grad - want).norm() <= 1e-4 * want.norm() + 1e-5, name


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_sequence_is_as_long_as_all_that_is_read_of_it_whatever_is_learnt(folder, ragged, packing):
    """The first token alone is learnt, so that of a long sequence the last learnt one stands where a short one ends."""
    policy = load_policy(PolicySection(model=str(folder), adapter=Full()), LoadOptions(packing=packing))
    firsts = [example | {"learn_at": [[0] for _ in example["completion_ids"]]} for example in ragged]
    batch = policy.collate(firsts)
    values = TokenScorer(policy)(batch).logprobs[batch.completion_mask]
    every, _ = alone(folder, ragged)
    sizes = torch.tensor([len(ids) for example in ragged for ids in example["completion_ids"]])
    assert_close(values, every[sizes.cumsum(0) - sizes], atol=1e-5, rtol=0)


def test_it_does_matter_what_else_is_in_a_pass_of_the_model_itself(folder, ragged):
    """Else the test above could not fail."""
    expected, _ = alone(folder, ragged)
    model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = collate(ragged, pad_id=0)
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    mask = batch.completion_mask
    assert (logits[batch.predict_at[mask], batch.targets[mask]] - expected).abs().max() > 0.02


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_reward_model_too(folder, ragged, packing):
    model = load_reward_model(
        PolicySection(model=str(folder), adapter=Lora(rank=2)), LoadOptions(packing=packing), outputs=["score"]
    )
    rewards = RewardScorer(model.model).eval()(model.collate(ragged))[:, 0]
    model.model.get_base_model().save_pretrained(folder / "whole")
    expected = []
    base = model.model.get_base_model()
    for example in ragged:
        for ids in example["completion_ids"]:
            row = [*example["prompt_ids"], *ids]
            one = RewardScorer(model.model)(model.collate([example | {"completion_ids": [ids], "grades": [0.0]}]))
            expected.append(one[0, 0])
            assert regimes(base, torch.tensor([len(row)]))
    assert_close(rewards, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_a_scorer_gives_a_text_the_reward_that_it_has_alone(folder, tmp_path, exact, save_tokenizer):
    torch.manual_seed(7)
    config = t.AutoConfig.from_pretrained(folder, num_labels=1)
    t.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    save_tokenizer(tmp_path / "reward")
    options = {"name": "sequence_classifier", "model": str(tmp_path / "reward"), "exact": exact, "max_length": 64}
    texts = [" ".join(f"w{3 + (7 * i + k) % 37}" for k in range(3 + 4 * i)) for i in range(6)]
    together = load_scorer(options).score(["w3 "] * 6, texts)
    single = []
    for text in texts:
        model = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32).eval()
        tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "reward")
        single.append(model(**tokenizer("w3 " + text, return_tensors="pt")).logits.item())
    assert_close(
        torch.tensor(together), torch.tensor(single, dtype=torch.float64).float(), atol=1e-5, rtol=0, check_dtype=False
    )


def test_it_is_said_at_load(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="align"):
        load_policy(PolicySection(model=str(folder), adapter=Lora(rank=2)))
    assert any("frequencies change beyond 8 tokens" in record.getMessage() for record in caplog.records)


def test_an_unknown_embedding_that_looks_at_the_whole_pass_is_refused(tiny_policy):
    model = t.AutoModelForCausalLM.from_pretrained(tiny_policy)
    fix_frequencies(model, name="tiny")
    rotary = type(model.model.rotary_emb)

    class OwnRotaryEmbedding(rotary):
        def forward(self, x, position_ids):
            cos, sin = super().forward(x, position_ids)
            return cos * (1 + position_ids.max() / 100), sin

    model.model.rotary_emb.__class__ = OwnRotaryEmbedding
    with pytest.raises(UserError, match="depends on the other sequences of a pass"):
        fix_frequencies(model, name="tiny")
