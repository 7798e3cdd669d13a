"""Adapters and merged checkpoints with tokenizer and card."""
