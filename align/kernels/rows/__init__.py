"""Softmax and its relatives over the last axis."""
