"""`align inspect`, `align annotate` and `align train`."""

from align.cluster.options import RAY
from align.command import ALLOW_CODE, Command, count, option
from align.recipe.options import KEYS, RECIPE, check_models

WHOLE = option(
    "--recipe",
    dest="whole",
    action="store_true",
    help="every key of the recipe, also at its default",
)
HTML = option("--html", metavar="FILE", help="write a page of these rows, every token with its role and id")

COMMANDS = (
    Command(
        "inspect",
        "the data audit, what the recipe sets and a few rows with their masks; no training",
        "align.training.inspect:inspect_recipe",
        (*RECIPE, option("--rows", type=count, default=2, help="rows to show (default 2)"), WHOLE, HTML),
        before=check_models,
        more=KEYS,
    ),
    Command(
        "annotate",
        "what frozen models compute per row (token rewards, CHES, ...), into the cache",
        "align.training.annotate:annotate",
        (*RECIPE, ALLOW_CODE, *RAY),
        goes_on=True,
        before=check_models,
        more=KEYS,
    ),
    Command(
        "train",
        "train a policy or a reward model; a run that is already there goes on",
        "align.training.train:train",
        (*RECIPE, ALLOW_CODE),
        goes_on=True,
        before=check_models,
        more=KEYS,
    ),
)
