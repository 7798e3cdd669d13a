"""Tiny models of many architectures: one table, which the tests of values, packing and fusing all run over.

A function makes each anew, since transformers writes into the configuration that a model is built from.
"""

import transformers as t

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITHOUT_GROUPS = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
# As many learned positions as the longest sequence of the tests' lists has, fewer than a packed row.
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 40, "initializer_range": 0.4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
CONFIGS = {
    "llama": lambda: t.LlamaConfig(**SMALL),
    "qwen2": lambda: t.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": lambda: t.Qwen3Config(**SMALL, head_dim=8),
    "qwen3 moe": lambda: t.Qwen3MoeConfig(**SMALL, head_dim=8, **EXPERTS),
    "mistral": lambda: t.MistralConfig(**SMALL, sliding_window=4),
    "gemma": lambda: t.GemmaConfig(**SMALL, head_dim=8),
    "gemma2": lambda: t.Gemma2Config(
        **SMALL, head_dim=8, sliding_window=4, attn_logit_softcapping=0.5, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: t.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4),
    "phi3": lambda: t.Phi3Config(**SMALL, sliding_window=5),
    "cohere": lambda: t.CohereConfig(**SMALL, logit_scale=0.3),
    "granite": lambda: t.GraniteConfig(**SMALL, logits_scaling=2.5),
    "olmo2": lambda: t.Olmo2Config(**SMALL),
    "gpt2": lambda: t.GPT2Config(**GPT2),
    "gpt_neox": lambda: t.GPTNeoXConfig(**WITHOUT_GROUPS),
    "phi": lambda: t.PhiConfig(**SMALL),  # an LM head with a bias
}
