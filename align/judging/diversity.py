"""How varied and how repetitive texts are."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from align.lint.words import WORD

RUN = 4
"""Words of a run that a text may repeat."""


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different runs of n words, by all of them, over all texts together; None where there are none.

    Source: Li et al., arXiv:1510.03055 (distinct-n)
    """
    runs = [run for text in texts for run in _runs(text, n)]
    return len(set(runs)) / len(runs) if runs else None


def repetition(texts: Sequence[str]) -> float:
    """Mean over texts of the share of their runs of four words that they have had before; 0 for a shorter text.

    Source: Welleck et al., arXiv:1908.04319 (seq-rep-4)
    """
    every = [list(_runs(text, RUN)) for text in texts]
    return fmean(1 - len(set(runs)) / len(runs) if runs else 0.0 for runs in every)


def _runs(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return zip(*(words[start:] for start in range(n)), strict=False)
