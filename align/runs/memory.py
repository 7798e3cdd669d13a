"""A lack of memory: half of the tokens, by itself or in one sentence that says which key and where the work goes on."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState

from align.errors import UserError
from align.recipe import Recipe
from rewards.types import Running

log = logging.getLogger("align")

SAID = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's errors say of it on a GPU, on a CPU, and in cuBLAS."""
FLOOR = 256
"""Tokens of a forward pass below which memory is short for another reason: the model, or a single long text."""


def in_memory(recipe: Recipe, work: Callable[[Recipe], Any], *, goes_on: Callable[[], str]) -> Any:
    """The work of a recipe; where `train.tokens_per_batch` is `auto`, again with half of the tokens if memory lacks.

    Args:
        work: is called with a recipe that has a number there; what it has done is not done again.
        goes_on: where it goes on if it is called again.

    Raises:
        UserError: in place of torch's error: half of the tokens, where these may not or can no longer be halved.
    """
    auto = recipe.train.tokens_per_batch == "auto"
    tokens = recipe.train.batch_tokens
    while True:
        try:
            return work(_with_tokens(recipe, tokens))
        except (RuntimeError, MemoryError) as error:
            if not is_lack(error):
                raise
            # Another process may wait for this one, so that only starting all of them anew helps.
            if not auto or tokens // 2 < FLOOR or PartialState().num_processes > 1:
                raise UserError(_sentence(recipe, tokens, goes_on())) from error
        log.warning(
            "out of memory with passes of up to %d tokens; train.tokens_per_batch is `auto`, so it %s with %d, which "
            "does not change the result",
            *(tokens, goes_on(), tokens // 2),
        )
        tokens //= 2
        gc.collect()  # the model and the optimizer of the attempt; the error no longer holds them
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def lack_in_words(setting: str, tokens: int, *, goes_on: str) -> Iterator[None]:
    """Runs what may need more memory than there is, outside of training.

    Args:
        setting: what sets the tokens of a pass, with {} for their number: a recipe's key, or an option.
        tokens: of a pass now.
        goes_on: what becomes of what is done already.

    Raises:
        UserError: in place of torch's error: the setting with half of the tokens.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_lack(error):
            raise
        raise UserError(
            f"out of memory with passes of up to {tokens} tokens: {_half(setting, tokens)}; {goes_on}"
        ) from error


def scoring_in_words(config: Any, setting: str, *, goes_on: str) -> AbstractContextManager[None]:
    """`lack_in_words` for a scorer; one that runs no model, or one text per pass, has no tokens to halve."""
    if not isinstance(config, Running) or config.exact:
        return nullcontext()
    return lack_in_words(setting, config.tokens_per_batch, goes_on=goes_on)


def _half(setting: str, tokens: int) -> str:
    return f"call again with {setting.replace('{}', str(max(1, tokens // 2)))}"


def is_lack(error: BaseException) -> bool:
    """Whether an error says that memory is short, of the machine or of its GPU."""
    lacks = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return lacks or (isinstance(error, RuntimeError) and any(said in str(error) for said in SAID))


def in_one_sentence(error: BaseException) -> str | None:
    """What to say of a lack of memory that no number of tokens mends; None of another error."""
    if not is_lack(error):
        return None
    said = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
    return f"out of memory{said}; free some, take a smaller model, or hold it in bfloat16 (`policy.dtype`, `dtype`)"


def _with_tokens(recipe: Recipe, tokens: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens_per_batch": tokens})})


def _sentence(recipe: Recipe, tokens: int, goes_on: str) -> str:
    more = "" if recipe.train.gradient_checkpointing is True else ", or train.gradient_checkpointing=true"
    return (
        f"out of memory with passes of up to {tokens} tokens: {_half('train.tokens_per_batch={}', tokens)}{more}; "
        f"neither changes the result, and it {goes_on}"
    )
