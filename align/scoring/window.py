"""What is done with one window, in this process or in an actor of a cluster: rows in, the text of their part out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from align.errors import UserError
from align.scoring.cache import RewardCache
from align.scoring.items import Item
from align.scoring.job import as_part
from align.scoring.scoring import Part, score_window
from rewards.digest import reads_text_without_template, scorer_digest

Finished = tuple[str, str | None]
"""A part as it is written, and why the first row that has no rewards has none."""


@dataclass(frozen=True)
class Task:
    """A window that has no part yet."""

    number: int
    items: list[Item]
    completions: int
    cached: dict[bytes, float]
    """Rewards that the cache had when the job was started, by key."""


class Scoring:
    """The scorers of a job; a scorer is loaded for the first text that needs it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.of_chats = any(reads_text_without_template(part.config) for part in parts)

    def cached(self, items: Sequence[Item], store: RewardCache | None, state: int) -> dict[bytes, float]:
        """What the cache, as it was at a state, holds for some rows: the one place that reads it."""
        if store is None or not state:
            return {}
        rows = [item for item in items if item.reason is None]
        return store.read([key for part in self.parts for item in rows for key in part.keys(item)], state)

    def __call__(self, task: Task) -> Finished:
        """Score a window."""
        began, before = time.monotonic(), self._tallies()
        scored = score_window(task.items, self.parts, task.cached)
        failed = [own.item.reason for own in scored if own.item.reason is not None]
        counts = {name: value - before[name] for name, value in self._tallies().items()}
        counts |= {"rows": len(scored) - len(failed), "errors": len(failed)}
        counts["text_rows_without_template"] = sum(own.item.is_text for own in scored) * self.of_chats
        counts["completions"] = sum(len(own.item.completions) for own in scored if own.rewards)
        return as_part(scored, {**counts, "seconds": time.monotonic() - began}), failed[0] if failed else None

    def _tallies(self) -> dict[str, float]:
        tallies = [part.scorer.tally for part in self.parts if part.scorer is not None]
        return {
            "scored": sum(tally.completions for tally in tallies),
            "tokens": sum(tally.tokens for tally in tallies),
            "truncated": sum(tally.truncated for tally in tallies),
            "cached": sum(part.cached for part in self.parts),
        }


def start_scoring(parts: Sequence[Part]) -> Scoring:
    """The same scorers in an actor.

    Args:
        parts: none of them loaded.

    Raises:
        UserError: on the actor's machine one of them would give other rewards.
    """
    for part in parts:
        if scorer_digest(part.config) != part.digest:
            raise UserError(
                f"--ray: the scorer {part.config.name} is another one on a machine of the cluster than here: its "
                "files, its device, or the versions of torch and transformers differ; make them equal, and where only "
                "the cluster has GPUs give the scorer `device: cuda`"
            )
    return Scoring([replace(part) for part in parts])
