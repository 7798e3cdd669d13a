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
MAMBA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
SCAN = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
LINEAR = {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
FEW = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
WITH_STATE = {
    "mamba": lambda: t.MambaConfig(**MAMBA, time_step_rank=4),
    "falcon mamba": lambda: t.FalconMambaConfig(**MAMBA, time_step_rank=4),
    "mamba2": lambda: t.Mamba2Config(**MAMBA, num_heads=4, head_dim=8, n_groups=2, chunk_size=8),
    "qwen3 next": lambda: t.Qwen3NextConfig(**SMALL, **LINEAR, **DELTA, **FEW, shared_expert_intermediate_size=8),
    "qwen3.5": lambda: t.Qwen3_5TextConfig(**SMALL, **LINEAR, **DELTA),
    "qwen3.5 moe": lambda: t.Qwen3_5MoeTextConfig(**SMALL, **LINEAR, **DELTA, **FEW, shared_expert_intermediate_size=8),
    "olmo hybrid": lambda: t.OlmoHybridConfig(
        **SMALL, **DELTA | {"linear_num_value_heads": 2}, layer_types=LINEAR["layer_types"]
    ),
    "kimi linear": lambda: t.KimiLinearConfig(**SMALL, **FEW, linear_num_heads=2, linear_head_dim=4),
    "jamba": lambda: t.JambaConfig(
        **SMALL, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4
    ),
    "falcon h1": lambda: t.FalconH1Config(
        **SMALL, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4, mamba_chunk_size=8
    ),
    "granite hybrid": lambda: t.GraniteMoeHybridConfig(
        **SMALL, **SCAN, layer_types=["mamba", "attention"], num_local_experts=2, num_experts_per_tok=1
    ),
    "bamba": lambda: t.BambaConfig(**SMALL, **SCAN, attn_layer_indices=[1]),
    "nemotron h": lambda: t.NemotronHConfig(
        **SMALL,
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        chunk_size=8,
        head_dim=8,
    ),
    "zamba2": lambda: t.Zamba2Config(
        **SMALL, mamba_d_state=4, n_mamba_heads=2, mamba_headdim=16, chunk_size=8, layers_block_type=["mamba", "hybrid"]
    ),
    "lfm2": lambda: t.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "lfm2 moe": lambda: t.Lfm2MoeConfig(**SMALL, **FEW, layer_types=["conv", "full_attention"], num_dense_layers=1),
    "rwkv": lambda: t.RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, context_length=128),
    "minimax": lambda: t.MiniMaxConfig(**SMALL, **LINEAR, block_size=8, num_local_experts=2, num_experts_per_tok=1),
    "xlstm": lambda: t.xLSTMConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_heads=2),
}
"""Models that carry something from token to token otherwise than by attention, in all of their layers or in some."""
