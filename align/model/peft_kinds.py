"""PEFT's kinds of adapters: what each needs to start as the base does, or why it cannot train here.

A test holds the table to the registry of the PEFT that is installed, so that a newer one shows what is new.
"""

from dataclasses import dataclass, field
from typing import Any

TOKENS = "puts tokens of its own before the prompt, for which a packed row has no place"


@dataclass(frozen=True)
class Kind:
    """One of PEFT's types."""

    what: str
    """What it trains, in a few words."""
    needs: dict[str, Any] = field(default_factory=dict)
    """Options that it is given unless the recipe says otherwise: with PEFT's own defaults it would not start as the
    base does, or could not be saved."""
    moved: bool = False
    """It has no such options, so that its reference is a frozen copy of its start."""
    offset: bool = False
    """It adds to layers' outputs, for which a base without biases has no place."""
    linear: bool = True
    """Whether it acts in every linear layer, where nothing is said; else in those that PEFT chooses."""
    instead: str = ""
    """The adapter of ours that is the same and more."""
    why_not: str = ""
    """Why it cannot train here, as the end of a sentence; what to take instead."""


KINDS = {
    "ADALORA": Kind("an SVD whose ranks move to the layers that need them", instead="adalora"),
    "ADAMSS": Kind("clusters of rows in the trailing directions of a weight"),
    "ADAPTION_PROMPT": Kind(
        "prompts inside the attention",
        why_not="replaces whole attention modules, which a reference cannot switch off; take another type",
    ),
    "BEFT": Kind("an offset of a layer's outputs", offset=True),
    "BOFT": Kind("a product of sparse rotations of the weight"),
    "C3A": Kind("circular convolutions of blocks", needs={"init_weights": True}),
    "CARTRIDGE": Kind("keys and values of trained tokens", why_not=f"{TOKENS}; take another type"),
    "CPT": Kind("trained tokens of examples", why_not=f"{TOKENS}; take another type"),
    "DEFT": Kind("a projection out of and a step into a low-rank space"),
    "DELORA": Kind("LoRA of normalised factors with a strength of its own"),
    "FOURIERFT": Kind("a few coefficients of the update's Fourier transform", needs={"init_weights": True}),
    "FROD": Kind("a sparse and a diagonal part in directions that layers share"),
    "GLORA": Kind("LoRA on weight, bias and features"),
    "GRALORA": Kind("a LoRA for each block of the weight"),
    "HIRA": Kind("the weight times a low-rank matrix, entry by entry"),
    "HRA": Kind("a chain of reflections of the weight"),
    "IA3": Kind("a factor for each channel", linear=False, instead="ia3"),
    "LILY": Kind(
        "LoRA with experts that layers share",
        why_not="weighs its experts by the mean over all tokens of a batch, so that a token's log-probability depends "
        "on the tokens behind it and on other rows; take GRALORA",
    ),
    "LN_TUNING": Kind("the norms' weights", linear=False),
    "LOHA": Kind("the product, entry by entry, of two low-rank matrices"),
    "LOKR": Kind("a Kronecker product"),
    "LORA": Kind("two low-rank factors", instead="lora, rslora, dora, pissa, olora, eva or loftq"),
    "MISS": Kind("one block, shared between the shards of a weight", instead="miss"),
    "MULTITASK_PROMPT_TUNING": Kind("trained tokens of several tasks", why_not=f"{TOKENS}; take another type"),
    "OFT": Kind("a rotation of blocks of the weight"),
    "OSF": Kind("all but the weight's leading directions, which are kept"),
    "PEANUT": Kind("a small network that reads the weight"),
    "POLY": Kind("a mixture of LoRAs by task", why_not="needs a task's number with every row; take lora"),
    "PREFIX_TUNING": Kind("keys and values of trained tokens", why_not=f"{TOKENS}; take another type"),
    "PROMPT_TUNING": Kind("trained tokens", why_not=f"{TOKENS}; take another type"),
    "PSOFT": Kind("a rotation within the weight's leading directions"),
    "PVERA": Kind("VeRA with noise in training"),
    "P_TUNING": Kind("trained tokens from a network", why_not=f"{TOKENS}; take another type"),
    "RANDLORA": Kind("weights of random low-rank matrices of full rank together", needs={"save_projection": False}),
    "ROAD": Kind("rotations of pairs of outputs"),
    "SHADOW": Kind(
        "a small network beside the model",
        why_not="runs in PEFT's own forward pass, which packed rows do not go through, so that it gets no gradient; "
        "take another type",
    ),
    "SHIRA": Kind("a few entries of the weight"),
    "SUPERTUNING": Kind("a few whole channels of the weight"),
    "TINYLORA": Kind("a handful of numbers in the weight's leading directions"),
    "TRAINABLE_TOKENS": Kind("rows of the embeddings (`options: {token_indices: [...]}`)", linear=False),
    "UNILORA": Kind("one vector, projected into the factors of all layers", moved=True),
    "VBLORA": Kind("factors put together from a bank of vectors that all layers share", moved=True),
    "VERA": Kind("scales of random factors that layers share"),
    "WAVEFT": Kind("a few coefficients of the update's wavelet transform"),
    "XLORA": Kind("a mixture of trained LoRAs", why_not="mixes adapters that are trained already; take lora"),
}
