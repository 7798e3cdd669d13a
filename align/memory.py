"""A lack of memory becomes one sentence: which keys, which values, and where the run goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from align.errors import UserError
from align.recipe import Recipe
from align.run_directory import RunDirectory

SAID = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's errors say of it on a GPU, on a CPU, and in cuBLAS."""


@contextmanager
def memory_in_words(recipe: Recipe, run: RunDirectory) -> Iterator[None]:
    """Runs what may need more memory than there is.

    Raises:
        UserError: in place of torch's error: half of the tokens, and that the run then goes on.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_lack(error):
            raise
        raise UserError(_sentence(recipe, run)) from error


def _is_lack(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(said in str(error) for said in SAID)


def _sentence(recipe: Recipe, run: RunDirectory) -> str:
    tokens, last = recipe.train.tokens_per_batch, run.last_checkpoint()
    half = f"train.tokens_per_batch={max(1, tokens // 2)}"
    place = f"goes on from step {last.name.split('-')[1]}" if last else "begins again"
    more = "" if recipe.train.gradient_checkpointing is True else ", or train.gradient_checkpointing=true"
    return (
        f"out of memory with passes of up to {tokens} tokens: call again with {half}{more}; "
        f"neither changes the result, and the run in {run.path} {place}"
    )
