"""`align rollout`."""

from align.cluster.options import RAY
from align.command import ALLOW_CODE, Command
from align.recipe.options import KEYS, RECIPE, check_models

COMMANDS = (
    Command(
        "rollout",
        "sample completions of the prompts in data.sources, and score them",
        "align.rollout.sample:rollout",
        (*RECIPE, ALLOW_CODE, *RAY),
        goes_on=True,
        before=check_models,
        more=KEYS,
    ),
)
