"""Layers that keep and compute less than the operations that they stand for."""

from align.fused.linear import Projection, lora_linear
from align.fused.mlp import ACTIVATIONS, Activation, gated_mlp
from align.fused.norm import rms_norm
from align.fused.rows import asked_rows, on_asked_rows

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Projection",
    "asked_rows",
    "gated_mlp",
    "lora_linear",
    "on_asked_rows",
    "rms_norm",
]
