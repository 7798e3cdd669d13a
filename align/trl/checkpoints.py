"""Checkpoints in transformers' layout, sealed when they are whole; resuming reads them against their manifest."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from align.errors import UserError
from align.files import give_mode, read_object, sync, write_json
from align.manifest import MANIFEST, Damaged, check, seal
from align.runs.checkpoints import NAME, numbered, step_of

SETS = ("target_modules", "exclude_modules")

log = logging.getLogger("align")


@contextmanager
def sealed(trainer: Any, trial: Any) -> Iterator[None]:
    """Inside, a trainer writes a checkpoint; it drops older ones only when this one is whole and on the disk."""
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    try:
        yield
    finally:
        trainer.args.save_total_limit = limit
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    folder = Path(trainer._get_output_dir(trial=trial))
    seal(folder / f"checkpoint-{trainer.state.global_step}")
    sync(folder)
    best = trainer.state.best_model_checkpoint
    rotate_checkpoints(output_dir=str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


def tidy(folder: Path) -> None:
    """Give files that were written through temporary ones the folder's mode, and an adapter's config one order."""
    for file in filter(Path.is_file, folder.iterdir()):
        give_mode(file, folder)
    config = folder / "adapter_config.json"
    if config.exists():  # PEFT writes sets, whose order is another in every process
        values = {
            name: sorted(own) if name in SETS and isinstance(own, list) else own
            for name, own in read_object(config).items()
        }
        write_json(config, values)


def verified(resume: str | bool | None, output_dir: str) -> str | bool | None:
    """What a trainer may resume from: for True the newest checkpoint that is whole, and those of other tools as they
    are, since they say nothing of themselves.

    Raises:
        UserError: the checkpoint that was named is not as it was written, or none of several is.
    """
    if not resume:
        return resume
    if resume is not True:
        if problem := _problem(Path(resume)):
            raise UserError(f"{problem}; resume from an older checkpoint")
        return resume
    found = numbered(Path(output_dir))[::-1]
    problems = []
    for checkpoint in found:
        problem = _problem(checkpoint)
        if not problem:
            return str(checkpoint)
        problems.append(problem)
        log.warning("%s is passed over: %s", checkpoint, problem)
    if problems:
        raise UserError(f"{problems[0]}; no checkpoint in {output_dir} is whole: train without resuming")
    return True


def _problem(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; one without a manifest is another tool's, if it was written to its end."""
    if not (checkpoint / MANIFEST).exists() and (checkpoint / TRAINER_STATE_NAME).exists() and not _is_ours(checkpoint):
        return ""
    try:
        check(checkpoint)
    except Damaged as problem:
        return str(problem)
    return ""


def _is_ours(checkpoint: Path) -> bool:
    """Whether a neighbour before it was sealed, so that this one was not written to its end."""
    sealed = [one for one in numbered(checkpoint.parent) if (one / MANIFEST).exists()]
    return bool(NAME.fullmatch(checkpoint.name)) and any(step_of(one) < step_of(checkpoint) for one in sealed)
