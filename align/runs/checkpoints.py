"""A run's checkpoints: sealed when they are whole, verified before a run goes on from one, dropped when newer are."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from align.errors import UserError
from align.files import remove_folder, sync
from align.manifest import Damaged, check, seal

NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
METRICS = "metrics.jsonl"
"""In a checkpoint: the run's lines so far."""

log = logging.getLogger("align")


class Checkpoints:
    """The checkpoints of one run; each is read against its manifest once."""

    def __init__(self, folder: Path, metrics: Path, identity: Callable[[], dict[str, str]]) -> None:
        """Args:
        metrics: the run's own file.
        identity: what tells the run from others whose checkpoints do not fit it.
        """
        self.folder, self.metrics, self.identity = folder, metrics, identity
        self._problems: dict[Path, str] = {}

    def begin(self, step: int) -> Path:
        """The folder of a new checkpoint, without what a kill, or damage, has left of an older one of its name."""
        checkpoint = self.folder / f"checkpoint-{step}"
        remove_folder(checkpoint)
        return checkpoint

    def end(self, checkpoint: Path, *, keep: int) -> None:
        """Seal a checkpoint that all processes have written and, when it is on the disk, drop those that it replaces:
        older ones than the newest `keep`, and what was passed over."""
        shutil.copyfile(self.metrics, checkpoint / METRICS)
        seal(checkpoint, {"step": step_of(checkpoint), **self.identity()})
        sync(self.folder)
        sync(self.folder.parent)
        self._problems[checkpoint] = ""
        for later in (one for one in numbered(self.folder) if step_of(one) > step_of(checkpoint)):
            remove_folder(later)
        self.drop_older(checkpoint, keep=keep)

    def drop_older(self, checkpoint: Path, *, keep: int) -> None:
        """Remove those up to one that is on the disk, but the newest `keep`: a kill may have come before that."""
        present = [one for one in numbered(self.folder) if step_of(one) <= step_of(checkpoint)]
        kept = [one for one in present if not self._problems.get(one)][-keep:]
        for other in present:
            if other not in kept:
                remove_folder(other)

    def whole(self) -> list[Path]:
        """Those that are as they were written, oldest first.

        Raises:
            UserError: one is of another run.
        """
        return [one for one in numbered(self.folder) if self._is_whole(one)]

    def newest(self) -> Path | None:
        """The newest that is as it was written; says which are passed over, and why.

        Raises:
            UserError: a newer one is of another run.
        """
        return next((one for one in reversed(numbered(self.folder)) if self._is_whole(one)), None)

    def pass_over(self, checkpoint: Path, reason: str) -> None:
        """Take it for one that is not whole, and say so."""
        self._problems[checkpoint] = reason
        log.warning("%s is passed over: %s", checkpoint, reason)

    def problem(self) -> str:
        """Why the newest of those that were looked at was passed over; empty where none was."""
        return next((own for _, own in sorted(self._problems.items(), key=lambda one: -step_of(one[0])) if own), "")

    def _is_whole(self, checkpoint: Path) -> bool:
        if checkpoint not in self._problems:
            try:
                about = check(checkpoint)
                if about["step"] != step_of(checkpoint):
                    raise Damaged(f"it is a copy of checkpoint-{about['step']}")
            except Damaged as problem:
                self.pass_over(checkpoint, str(problem))
                return False
            self._problems[checkpoint] = ""
            if odd := [name for name, own in self.identity().items() if about.get(name, own) != own]:
                raise UserError(
                    f"{checkpoint}: a checkpoint of another run (of other {' and '.join(odd)}); move it away, and the "
                    "same command goes on"
                )
        return not self._problems[checkpoint]


def numbered(folder: Path) -> list[Path]:
    """The folders that are named as checkpoints are, whole or not, by their step."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((one for one in found if NAME.fullmatch(one.name) and one.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint was written after."""
    return int(checkpoint.name.split("-")[1])
