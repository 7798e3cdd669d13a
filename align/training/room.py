"""Before the first step: the disk that a run will take against what is free."""

import logging
from typing import Any

from align.disk import free, in_words, size_of
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
    each = weights + optimizer_bytes(trained, recipe.train.optimizer.name)
    have = free(run.path) + size_of(run.checkpoints) + size_of(run.best)
    count = recipe.train.keep_checkpoints + 1
    every = count * each + weights * (2 if recipe.train.keep_best else 1)
    if each + weights > have:
        raise UserError(
            f"{run.path}: a checkpoint of this run takes about {in_words(each)}, its result {in_words(weights)}, and "
            f"{in_words(have)} are free; make room, or give `output` a folder on another disk"
        )
    if every > have:
        log.warning(
            "%s: %d checkpoints of about %s and the result take %s, and %s are free; make room, or give "
            "train.keep_checkpoints=1",
            *(run.path, count, in_words(each), in_words(every), in_words(have)),
        )
