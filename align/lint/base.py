"""What a check of preference data is: a class that looks at rows as texts and says one thing of them, with its n."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from align.lazy import LazyModule
from align.registry import Registry

Given = TypeVar("Given")
np: Any = LazyModule("numpy")
CHECK: "Registry[Check]" = Registry("check")
ROWS = 2000
"""Rows that a check looks at, of more a random sample; those that compare prompts look at more."""
PROMPTS = 50_000
"""Prompts of a side that are looked at, of more a random sample: seconds, not minutes."""


@dataclass(frozen=True)
class TextRow:
    """A row as a reader sees it."""

    prompt: str
    """What was asked, without system messages."""
    completions: tuple[str, ...]
    """What the assistant wrote; of several messages all that are its own."""
    grades: tuple[float, ...]
    place: str
    """Where it was read."""
    heldout: bool = False
    chat: bool = False
    """Whether it was messages, which a chat template writes."""


@dataclass(frozen=True)
class Finding:
    """What one check says."""

    check: str
    words: str
    """A sentence with its figures and their n."""
    figures: dict[str, float]
    bad: bool
    """Whether a run that asked for it stops."""
    places: tuple[str, ...] = ()
    """A few rows to look at."""

    @property
    def said(self) -> str:
        """The sentence with the rows to look at."""
        return self.words + (f" (see {'; '.join(self.places)})" if self.places else "")


class Check(ABC):
    """One thing that is looked for in the rows; its docstring says what, as the page of checks shows it."""

    name: ClassVar[str]
    bad: ClassVar[str]
    """When a run stops that names it in `data.stop_on`, in words."""
    cheap: ClassVar[bool] = True
    """Whether every run can afford it."""
    whole: ClassVar[bool] = False
    """Whether it compares prompts: it gets PROMPTS rows of either side, without their completions."""

    @classmethod
    @abstractmethod
    def find(cls, rows: Sequence[TextRow]) -> Finding | None:
        """What it says of the rows; None where they hold nothing of the kind."""

    @classmethod
    def finding(cls, words: str, figures: dict[str, float], *, bad: bool, places: Sequence[str] = ()) -> Finding:
        """A finding of this check, with the first few places."""
        return Finding(cls.name, words, figures, bad, tuple(places[:3]))


def look(
    rows: Sequence[Given], names: Sequence[str], read: Callable[[Given], TextRow], *, heldout: Sequence[Given] = ()
) -> list[Finding]:
    """What the checks of these names say, in the registry's order; texts of no more than their samples are in memory.

    Args:
        rows, heldout: all, of any kind; perhaps on disk.
        names: of checks.
        read: makes text of a row.
    """
    checks = [own for name, own in CHECK.classes.items() if name in names]
    if not len(rows) + len(heldout):
        return []
    some, every = [own for own in checks if not own.whole], [own for own in checks if own.whole]
    texts: dict[bool, list[TextRow]] = {}
    if some:
        places = sampled(range(len(rows) + len(heldout)), ROWS)
        texts[False] = [read(rows[k] if k < len(rows) else heldout[k - len(rows)]) for k in places]
    if every:
        texts[True] = [replace(read(side[k]), completions=()) for side in (rows, heldout) for k in _some(side)]
    found = [own.find(texts[own.whole]) for own in checks]
    return [own for own in found if own is not None]


def _some(side: Sequence[Given]) -> Sequence[int]:
    return sampled(range(len(side)), PROMPTS)


def sampled(rows: Sequence[Given], count: int) -> Sequence[Given]:
    """At most so many rows, drawn without replacement by a fixed seed, in their order."""
    if len(rows) <= count:
        return rows
    chosen = np.random.default_rng(0).choice(len(rows), count, replace=False)
    return [rows[place] for place in sorted(chosen.tolist())]


def share(part: int, whole: int) -> str:
    """`3 of 200 (1.5 %)`."""
    return f"{part} of {whole} ({100 * part / whole:.1f} %)"
