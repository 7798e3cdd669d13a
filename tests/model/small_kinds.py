"""PEFT's kinds of adapters on models of a few numbers."""

SMALL = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "LN_TUNING": {},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 2},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7]},
    "VBLORA": {"vector_length": 4},
    "WAVEFT": {"n_frequency": 20},
    **dict.fromkeys(("FROD", "ADAMSS", "BEFT", "IA3", "OSF", "RANDLORA", "SUPERTUNING"), {}),
}
"""What a type needs on so small a model; `r: 4` where it is not here."""
