"""Prompts that are nearly the same, on one side and across."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from align.lazy import LazyModule
from align.lint.base import CHECK, PROMPTS, Check, Finding, TextRow, np, sampled, share

rensa: Any = LazyModule("rensa")
WORD = re.compile(r"\w+")
ALIKE = 0.8
"""Of two prompts' runs of three words the share that is in both (Jaccard's): with as much they are nearly the same."""
LAST = 400
"""Words of a prompt that are compared, its last."""
COMMON = 0.02
"""A run of words in more of the prompts than this, and in more than SEVERAL, is a frame that they share."""
SEVERAL = 20
CANDIDATES = 50
"""Prompts that one is held against at most, of those that may be alike."""
FIRST, SECOND = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
"""Odd numbers, so that a run's digest depends on the order of its words."""
BANDS, WIDTH = 32, 5
"""Of MinHash: prompts alike to 0.8 are missed once in 300 000 times, by (1 - 0.8^WIDTH)^BANDS."""


@dataclass
class Prompts:
    """Prompts by their words, each once."""

    runs: list[Any]
    """Of each its runs of three words that are no frame; see `_runs`."""
    row_of: list[TextRow]
    """A row of each."""
    rows: Counter[int] = field(default_factory=Counter)
    """How many rows each has."""


def prompts_of(rows: Sequence[TextRow], frame: Any) -> Prompts:
    """The different prompts of rows; two that differ in case, punctuation or white space alone are one."""
    number: dict[int, int] = {}
    found = Prompts([], [])
    for row in rows:
        words = _words(row.prompt)
        whole = _digest(" ".join(words) or row.prompt.strip())
        if whole not in number:
            number[whole] = len(number)
            own = np.setdiff1d(_runs(words), frame, assume_unique=True)
            found.runs.append(own if len(own) else np.array([whole], dtype=np.uint64))
            found.row_of.append(row)
        found.rows[number[whole]] += 1
    return found


def frame_of(rows: Sequence[TextRow]) -> Any:
    """Runs of words that many different prompts share: an instruction before each, a form that is filled in."""
    different = {_digest(" ".join(words)): _runs(words) for words in (_words(row.prompt) for row in rows)}
    runs, counts = np.unique(np.concatenate([*different.values()]), return_counts=True)
    return runs[counts > max(SEVERAL, COMMON * len(different))]


class Index:
    """Finds prompts that are alike: candidates by MinHash, of which each is then compared run by run."""

    def __init__(self, runs: Sequence[Any]) -> None:
        self.runs = runs
        self.table = rensa.RMinHashLSH(threshold=ALIKE, num_perm=BANDS * WIDTH, num_bands=BANDS)
        for key, own in enumerate(runs):
            self.table.insert(key, _hash(own))

    def alike(self, own: Any, *, before: int | None = None) -> int | None:
        """The first prompt that is alike, if any, of those `before` a place."""
        found: Iterable[int] = sorted(set(self.table.query(_hash(own))))
        candidates = [key for key in found if before is None or key < before][:CANDIDATES]
        return next((key for key in candidates if _jaccard(own, self.runs[key]) >= ALIKE), None)


@CHECK.add
class Leak(Check):
    """Held-out prompts that a training row has too, nearly: figures on them are of what was learnt by heart. Words are
    compared, so a paraphrase is not found, nor an earlier turn of the same conversation."""

    name = "leak"
    bad = "any held-out prompt is"
    cheap = False
    whole = True

    @classmethod
    def find(cls, rows: Sequence[TextRow]) -> Finding | None:
        train, heldout = (sampled([row for row in rows if row.heldout is side], PROMPTS) for side in (False, True))
        if not train or not heldout:
            return None
        frame = frame_of([*train, *heldout])
        learnt, asked = prompts_of(train, frame), prompts_of(heldout, frame)
        index = Index(learnt.runs)
        met = [(k, twin) for k, own in enumerate(asked.runs) if (twin := index.alike(own)) is not None]
        count = sum(asked.rows[k] for k, _ in met)
        words = f"{share(count, len(heldout))} held-out rows have a prompt that is nearly one of the training rows' "
        words += f"({len(train)} rows)"
        places = [f"{asked.row_of[k].place} and {learnt.row_of[twin].place}" for k, twin in met]
        figures = {"share": count / len(heldout), "heldout": len(heldout), "train": len(train)}
        return cls.finding(words, figures, bad=count > 0, places=places)


@CHECK.add
class NearDuplicates(Check):
    """Training prompts that are nearly an earlier one, in other case, punctuation or a few words: they count more than
    they seem to."""

    name = "near_duplicates"
    bad = "a tenth of the training rows have such a prompt"
    cheap = False
    whole = True

    @classmethod
    def find(cls, rows: Sequence[TextRow]) -> Finding | None:
        train = sampled([row for row in rows if not row.heldout], PROMPTS)
        if len(train) < 2:
            return None
        prompts = prompts_of(train, frame_of(train))
        index = Index(prompts.runs)
        met = [(k, twin) for k, own in enumerate(prompts.runs) if (twin := index.alike(own, before=k)) is not None]
        again = len(train) - len(prompts.runs)
        count = again + len(met)
        if not count:
            return None
        words = f"{share(count, len(train))} training rows have a prompt that is an earlier row's ({again} rows) "
        words += f"or nearly one ({len(met)} prompts)"
        places = [f"{prompts.row_of[k].place} and {prompts.row_of[twin].place}" for k, twin in met]
        figures = {"share": count / len(train), "rows": len(train), "same": again, "nearly": len(met)}
        return cls.finding(words, figures, bad=count >= 0.1 * len(train), places=places)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())[-LAST:]


def _runs(words: Sequence[str]) -> Any:
    """[R] uint64, each once and in order: digests of every three words that follow each other; of fewer of the whole.

    As texts those of a prompt of 400 words would take 80 KB.
    """
    if len(words) < 3:
        return np.array([_digest(" ".join(words))][: len(words)], dtype=np.uint64)
    own = np.array([*map(_digest, words)], dtype=np.uint64)
    return np.unique(own[:-2] * FIRST + own[1:-1] * SECOND + own[2:])  # modulo 2^64


@lru_cache(maxsize=2**16)
def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _jaccard(one: Any, other: Any) -> float:
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def _hash(runs: Any) -> Any:
    own = rensa.RMinHash(num_perm=BANDS * WIDTH, seed=42)
    own.update([*map(str, runs.tolist())])
    return own
