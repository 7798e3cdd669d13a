"""Lists as one row each: a prompt once, its completions behind it, and attention that knows who sees whom."""

from align.packing.attention import ATTENTION, Tree
from align.packing.collate import packed_collate

__all__ = ["ATTENTION", "Tree", "packed_collate"]
