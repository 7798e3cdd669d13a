"""The one place that decides how a recipe is trained: on rows that are there, or on what the policy samples."""

from align.errors import UserError
from align.recipe import Recipe
from align.recipe.idle import say_idle
from align.stopping import limited
from align.training.given import Given
from align.training.online import train_online
from align.training.result import RunResult
from align.training.run import train_rows

__all__ = ["RunResult", "train"]


def train(recipe: Recipe, given: Given | None = None, *, show: bool = True) -> RunResult:
    """Train the recipe's policy; a run that is already in `recipe.output` goes on where it stopped.

    Args:
        given: objects of the caller's own; see `align.Trainer`.
        show: print the figures at the end.

    Raises:
        UserError: the recipe, its data or its model cannot work; said before the first step.
        Stopped: by a signal or at the end of `train.time_limit`; the same call goes on.
    """
    say_idle(recipe)
    given = given or Given()
    if recipe.online and given.folder:
        raise UserError(
            "model, tokenizer: an online run reads its policy anew in every iteration; save them to a folder and name "
            "it as policy.model"
        )
    with limited(recipe.train.time_limit):
        return train_online(recipe, given, show=show) if recipe.online else train_rows(recipe, given=given, show=show)
