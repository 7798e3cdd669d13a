"""Preference alignment of language models with ranked lists of completions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.recipe import load_recipe
    from align.training.train import train

__all__ = ["load_recipe", "train"]


def __getattr__(name: str) -> Any:
    # Late, so that `rewards` and the kernels can be used without transformers' Trainer and its imports.
    if name == "load_recipe":
        from align.recipe import load_recipe

        return load_recipe
    if name == "train":
        from align.training.train import train

        return train
    raise AttributeError(f"module 'align' has no attribute '{name}'")
