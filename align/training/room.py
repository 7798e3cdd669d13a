"""Before the first step: the disk that a run will take against what is free."""

import logging
import shutil
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.planning.memory import optimizer_bytes
from align.recipe import Recipe
from align.runs.run_directory import RunDirectory

log = logging.getLogger("align")


def check_room(recipe: Recipe, run: RunDirectory, trainer: Any) -> None:
    """Refuse a run whose disk cannot hold one checkpoint and the result; warn where it cannot hold all that are kept.

    A new checkpoint is there before an old one goes. What the run already holds it will replace.

    Raises:
        UserError: says how much is needed, how much is free, and what makes it less.
    """
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in trained)
    each = weights + optimizer_bytes(trained, recipe.train.optimizer)
    have = shutil.disk_usage(run.path).free + _size(run.checkpoints) + _size(run.best)
    count = recipe.train.keep_checkpoints + 1
    every = count * each + weights * (2 if recipe.train.keep_best else 1)
    if each + weights > have:
        raise UserError(
            f"{run.path}: a checkpoint of this run takes about {_in_words(each)}, its result {_in_words(weights)}, and "
            f"{_in_words(have)} are free; make room, or give `output` a folder on another disk"
        )
    if every > have:
        log.warning(
            "%s: %d checkpoints of about %s and the result take %s, and %s are free; make room, or give "
            "train.keep_checkpoints=1",
            *(run.path, count, _in_words(each), _in_words(every), _in_words(have)),
        )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def _in_words(size: float) -> str:
    """Bytes, with three digits."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if size >= u or u == 1)
    return f"{size / unit:.3g} {name}"
