"""Logits of one model or prompt against those of another."""
