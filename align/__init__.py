"""Preference alignment of language models with ranked lists of completions."""

from typing import TYPE_CHECKING

from align.lazy import lazily

if TYPE_CHECKING:
    from align.recipe import load_recipe
    from align.training.hooks import ListsSeen, StepDone
    from align.training.interface import Trainer
    from align.training.result import RunResult
    from align.training.train import train

__all__ = ["ListsSeen", "RunResult", "StepDone", "Trainer", "load_recipe", "train"]

# Late, so that `rewards` and the kernels can be used without transformers' Trainer and its imports.
__getattr__ = lazily(
    __name__,
    {
        "recipe": ("load_recipe",),
        "training.hooks": ("ListsSeen", "StepDone"),
        "training.interface": ("Trainer",),
        "training.result": ("RunResult",),
        "training.train": ("train",),
    },
)
