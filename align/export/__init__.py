"""Adapters and merged checkpoints with tokenizer and card."""

from align.export.export import export

__all__ = ["export"]
