"""Models with fused layers against the same models without."""

import logging

import pytest
import small_configs
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from small_configs import SMALL
from torch.testing import assert_close

from align.model.adapters import Full, Lora
from align.model.config import PolicySection
from align.model.forward import TokenScorer, score_tokens
from align.model.fusing import enable_fusing
from align.model.policy import load_policy
from align.packing import packed_collate
from align.packing.batch import collate

CONFIGS = small_configs.CONFIGS | {
    "llama with biases": lambda: t.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)
}


def with_adapter(config, **options):
    """A random model in training mode under a LoRA that does something."""
    torch.manual_seed(5)
    base = t.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def values_and_gradients(model, batch, weights):
    values = score_tokens(model, batch).logprobs
    (weights * values).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return values.detach(), found


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_stay(name, ragged):
    model = with_adapter(CONFIGS[name](), lora_dropout=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = collate(ragged, pad_id=0)
    weights = torch.randn(batch.targets.shape)
    expected, wanted = values_and_gradients(model, batch, weights)
    assert enable_fusing(model, name=name)
    values, found = values_and_gradients(model, batch, weights)
    assert_close(values, expected, atol=1e-5, rtol=0)
    assert found.keys() == wanted.keys() and wanted
    for key, want in wanted.items():
        assert (found[key] - want).norm() <= 1e-5 * want.norm() + 1e-6, key


def layers_run(model, function):
    """Names of the linear modules whose own forward runs."""
    names: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    function()
    for hook in hooks:
        hook.remove()
    return names


def test_the_layers_do_run_fused(ragged):
    model = with_adapter(CONFIGS["llama"]())
    batch = collate(ragged, pad_id=0)
    assert len(layers_run(model, lambda: score_tokens(model, batch))) == 14 * 3  # base, A and B of every projection
    assert enable_fusing(model, name="llama")
    assert layers_run(model, lambda: score_tokens(model, batch)) == []


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_norms_run_fused_where_their_weight_is_frozen(name, ragged, monkeypatch):
    model, batch = with_adapter(CONFIGS[name]()), collate(ragged, pad_id=0)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert enable_fusing(model, name=name)
    values = score_tokens(model, batch).logprobs
    plain = []
    own = type(norms[0]).forward
    monkeypatch.setattr(type(norms[0]), "forward", lambda self, x: plain.append(self) or own(self, x))
    assert torch.equal(score_tokens(model, batch).logprobs, values) and not plain
    norms[0].weight.requires_grad_()
    score_tokens(model, batch)
    assert plain == norms[:1]


def test_the_last_layer_computes_the_rows_that_predict(model_folder, ragged):
    policy = load_policy(PolicySection(model=str(model_folder), adapter=Lora(rank=3)))
    rows = {}

    def count(place, name):
        return lambda module, inputs, output: rows.update({(place, name): (output != 0).any(-1).sum().item()})

    for place, layer in enumerate(policy.model.get_base_model().model.layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp"):
            layer.get_submodule(name).register_forward_hook(count(place, name))
    batch = policy.collate(ragged)
    TokenScorer(policy)(batch)
    everywhere, predicting = batch.input_ids.numel(), len(set(batch.predict_at[batch.completion_mask].tolist()))
    assert predicting < everywhere and len(rows) == 8
    for (place, name), found in rows.items():
        assert found == (predicting if place == 1 and name != "self_attn.k_proj" else everywhere), (place, name)


@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=["dropout", "dora", "bias"]
)
def test_what_is_more_than_two_factors_runs_as_it_is(options, ragged):
    model = with_adapter(CONFIGS["llama"](), **options)
    batch = collate(ragged, pad_id=0)

    def run():
        return score_tokens(model, batch)

    before = layers_run(model, run)
    expected = score_tokens(model.eval(), batch).logprobs
    assert enable_fusing(model, name="llama")
    assert_close(score_tokens(model, batch).logprobs, expected, atol=1e-5, rtol=0)
    model.train()
    assert layers_run(model, run) == before and before


def test_a_model_that_computes_otherwise_is_left_alone(ragged, caplog):
    model = with_adapter(CONFIGS["llama"]())
    mlp_class = type(model.get_base_model().model.layers[0].mlp)

    class Doubled(mlp_class):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in model.get_base_model().model.layers:
        layer.mlp.__class__ = Doubled
    expected = score_tokens(model, collate(ragged, pad_id=0)).logprobs
    with caplog.at_level(logging.WARNING, logger="align"):
        assert not enable_fusing(model, name="doubled")
    assert torch.equal(score_tokens(model, collate(ragged, pad_id=0)).logprobs, expected)
    (record,) = [r for r in caplog.records if r.name.startswith("align")]
    assert "run as they are" in record.getMessage()


def test_the_frozen_copy_of_full_training_has_weights_of_its_own(model_folder, ragged):
    policy = load_policy(PolicySection(model=str(model_folder), adapter=Full()))
    scorer, batch = TokenScorer(policy).eval(), packed_collate(ragged)
    start = scorer(batch).logprobs.detach()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    with policy.reference():
        assert torch.equal(scorer(batch).logprobs, start)
    assert (scorer(batch).logprobs - start).abs().max() > 1e-2


def test_the_reference_switches_the_factors_off(model_folder, ragged):
    policy = load_policy(PolicySection(model=str(model_folder), adapter=Lora(rank=3)))
    scorer, batch = TokenScorer(policy).eval(), policy.collate(ragged)
    start = scorer(batch).logprobs.detach()
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert (scorer(batch).logprobs - start).abs().max() > 1e-2
    with policy.reference():
        assert torch.equal(scorer(batch).logprobs, start)
