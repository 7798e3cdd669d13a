"""The one place that decides how a recipe is trained: on rows that are there, or on what the policy samples."""

from align.recipe import Recipe
from align.recipe.idle import say_idle
from align.training.online import train_online
from align.training.run import RunResult, train_rows

__all__ = ["RunResult", "train"]


def train(recipe: Recipe) -> RunResult:
    """Train the recipe's policy; a run that is already in `recipe.output` goes on where it stopped.

    Raises:
        UserError: the recipe, its data or its model cannot work; said before the first step.
    """
    say_idle(recipe)
    return train_online(recipe) if recipe.online else train_rows(recipe)
