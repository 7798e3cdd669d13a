"""Tiny random models of many architectures: loaded, and a packed LoRA step beside plain PEFT."""

import logging

import pytest
import torch
import transformers as t
from peft import PeftModel
from small_configs import SMALL, WITHOUT_GROUPS
from torch.testing import assert_close

from align.errors import UserError
from align.model.adapters import Full, Lora
from align.model.checks import check_forward
from align.model.config import PolicySection
from align.model.forward import TokenScorer, head_of
from align.model.policy import load_policy

EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
CONFIGS = {
    "llama": lambda: t.LlamaConfig(**SMALL),
    "gpt2": lambda: t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, initializer_range=0.4),
    "opt": lambda: t.OPTConfig(**WITHOUT_GROUPS, ffn_dim=24, word_embed_proj_dim=16, init_std=0.4),
    "bloom": lambda: t.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.4),
    "gemma2, soft-caps": lambda: t.Gemma2Config(**SMALL, head_dim=8, attn_logit_softcapping=2.0),
    "gemma3n": lambda: t.Gemma3nTextConfig(
        **SMALL,
        head_dim=8,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=40,
        laurel_rank=4,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
    ),
    "llama4, text": lambda: t.Llama4TextConfig(**SMALL, head_dim=8, intermediate_size_mlp=24, **EXPERTS),
    "mixtral, noise in training": lambda: t.MixtralConfig(**SMALL, **EXPERTS, router_jitter_noise=0.3),
    "recurrent gemma, soft-cap": lambda: t.RecurrentGemmaConfig(
        **SMALL, lru_width=16, attention_window_size=16, logits_soft_cap=30.0
    ),
    "hyperclovax, scale": lambda: t.HyperCLOVAXConfig(**SMALL, logits_scaling=0.25),
    "granite, scale": lambda: t.GraniteConfig(**SMALL, logits_scaling=4.0),
    "cohere, scale": lambda: t.CohereConfig(**SMALL, logit_scale=0.3),
    "cohere, scale of null": lambda: t.CohereConfig(**SMALL, logit_scale=1.0),
    "nanochat, soft-cap": lambda: t.NanoChatConfig(**SMALL),
    "mpt, scale of null": lambda: t.MptConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=40, logit_scale=None),
    "mpt, scale that it does not read": lambda: t.MptConfig(
        d_model=16, n_heads=2, n_layers=2, vocab_size=40, logit_scale=0.5
    ),
    "falcon h1, multiplier": lambda: t.FalconH1Config(
        **SMALL, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4, lm_head_multiplier=0.25
    ),
    "falcon, linear layers of its own": lambda: t.FalconConfig(**WITHOUT_GROUPS),
    "mamba": lambda: t.MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4, initializer_range=0.4
    ),
}
NO_EAGER = ("mamba",)


def save(config, folder, save_tokenizer, auto=t.AutoModelForCausalLM):
    torch.manual_seed(5)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.05:  # not all architectures read initializer_range
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, eos_token="</s>")
    return type(model)


def alone(model, lists):
    values = []
    for example in lists:
        for ids in example["completion_ids"]:
            row, start = torch.tensor([[*example["prompt_ids"], *ids]]), len(example["prompt_ids"]) - 1
            logits = model(input_ids=row, use_cache=False).logits[0, start:-1]
            values.append(logits.float().log_softmax(-1)[range(len(ids)), ids])
    return torch.cat(values)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_lora_step_is_plain_pefts(name, tmp_path, save_tokenizer, ragged):
    kind = save(CONFIGS[name](), tmp_path / "model", save_tokenizer)
    policy = load_policy(PolicySection(model=str(tmp_path / "model"), adapter=Lora(rank=3, alpha=6)))
    policy.save_adapter(tmp_path / "adapter")
    batch = policy.collate(ragged)
    ours = TokenScorer(policy).train()(batch).logprobs[batch.completion_mask]
    base = kind.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    peer = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    expected = alone(peer, ragged)
    assert_close(ours, expected, atol=1e-5, rtol=0)
    weights = torch.randn(len(ours))
    (weights * ours).sum().backward()
    (weights * expected).sum().backward()
    found = {n: p.grad for n, p in policy.model.named_parameters() if "lora_B" in n and p.grad is not None}
    wanted = {n: p.grad for n, p in peer.named_parameters() if "lora_B" in n and p.grad is not None}
    assert wanted and wanted.keys() - found.keys() <= {
        n for n in wanted if "correction_coefs" in n
    }  # Gemma 3n's, in eval
    for n, gradient in found.items():
        if n in wanted:
            assert (gradient - wanted[n]).norm() <= 1e-4 * wanted[n].norm() + 2e-6, n


@pytest.mark.parametrize("name", [name for name in CONFIGS if "scale" in name or "soft-cap" in name or "mult" in name])
def test_a_factor_or_cap_that_were_not_read_would_be_seen_at_load(name, monkeypatch):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)  # logits so small that a soft-cap hardly shows
    check_forward(model, name="tiny")
    head = head_of(model)
    for dropped in ({"logit_scale": 1.0}, {"softcap": None}):
        if head | dropped == head:
            continue
        monkeypatch.setattr("align.model.forward.head_of", lambda base, d=dropped: head_of(base) | d)
        with pytest.raises(UserError, match="computes logits in a way that is not supported"):
            check_forward(model, name="tiny")


def test_a_soft_cap_is_seen_under_bfloat16_too(monkeypatch):
    model = t.AutoModelForCausalLM.from_config(CONFIGS["recurrent gemma, soft-cap"]()).to(torch.bfloat16).eval()
    check_forward(model, name="tiny")
    monkeypatch.setattr("align.model.forward.head_of", lambda base: head_of(base) | {"softcap": None})
    with pytest.raises(UserError, match="computes logits in a way that is not supported"):
        check_forward(model, name="tiny")


def test_the_attentions_soft_cap_is_kept_or_said(tmp_path, save_tokenizer, ragged, caplog):
    save(CONFIGS["gemma2, soft-caps"](), tmp_path, save_tokenizer)
    with caplog.at_level(logging.INFO, logger="align"):
        capped = load_policy(PolicySection(model=str(tmp_path), adapter=Full()), keep_reference=False)
        messages = [record.getMessage() for record in caplog.records]
        assert any("soft-cap of 2, so it runs as `policy.attention: eager`" in message for message in messages)
        assert str(capped.model.config._attn_implementation).endswith("eager")
        plain = PolicySection(model=str(tmp_path), adapter=Full(), attention="sdpa")
        if not t.Gemma2ForCausalLM._supports_sdpa:  # transformers 5.24 and later
            with pytest.raises(UserError, match="does not support an attention implementation"):
                load_policy(plain, keep_reference=False)
            return
        uncapped = load_policy(plain, keep_reference=False)
    messages = [record.getMessage() for record in caplog.records]
    assert any("sdpa leaves out its attention's soft-cap of 2" in message for message in messages)
    values = [TokenScorer(p)(p.collate(ragged)).logprobs for p in (capped, uncapped)]
    assert (values[0] - values[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "config, sentence",
    [
        (t.BertConfig(**WITHOUT_GROUPS), "move by|computes logits in a way"),
        (t.BertConfig(**WITHOUT_GROUPS, is_decoder=True), "computes logits in a way"),
        (t.ModernBertDecoderConfig(**WITHOUT_GROUPS), "not built as a decoder with a linear LM head"),
    ],
    ids=["bert", "bert as a decoder", "modernbert decoder"],
)
def test_what_has_another_head_is_refused_in_a_sentence(config, sentence, tmp_path, save_tokenizer):
    save(config, tmp_path, save_tokenizer)
    with pytest.raises(UserError, match=sentence):
        load_policy(PolicySection(model=str(tmp_path)))


def test_a_model_that_trains_otherwise_than_it_is_measured_is_told(tmp_path, save_tokenizer, caplog):
    save(
        t.PhimoeConfig(**SMALL, **EXPERTS | {"num_experts_per_tok": 2}, router_jitter_noise=0.3),
        tmp_path,
        save_tokenizer,
    )
    with caplog.at_level(logging.WARNING, logger="align"):
        load_policy(PolicySection(model=str(tmp_path), adapter=Lora(rank=3)))
    assert any("computes otherwise in training mode" in record.getMessage() for record in caplog.records)


def test_layers_that_are_no_plain_linear_ones_get_no_adapter(tmp_path, save_tokenizer, caplog):
    save(CONFIGS["llama4, text"](), tmp_path, save_tokenizer)
    with caplog.at_level(logging.INFO, logger="align"):
        policy = load_policy(PolicySection(model=str(tmp_path), adapter=Lora(rank=3)))
    assert not any("router" in name for name, p in policy.model.named_parameters() if p.requires_grad)
    assert any("none on" in record.getMessage() and "router" in record.getMessage() for record in caplog.records)
