"""`align init`, `align recipe`, and how other commands are told of a recipe."""

from typing import Any

from align.command import TRUST_REMOTE_CODE, Command, option
from align.recipe.init import DATA, MODEL, TASKS

RECIPE = (
    option("recipe", metavar="RECIPE.yaml", help="a file, or the name of a recipe that ships"),
    option("overrides", nargs="*", metavar="key=value", help="such as train.learning_rate=1e-4"),
    TRUST_REMOTE_CODE,
)


def check_models(given: dict[str, Any]) -> None:
    """Refuse a hub name that cannot be fetched: of a recipe, of scorers, or a command's own."""
    from align.recipe import offline  # with pydantic, which `align --help` does without

    if "recipe" in given:
        offline.check_recipe(given)
    elif given.keys() & {"reward", "rewards"}:
        offline.check_rewards(given)
    else:
        offline.check_model(given)


KEYS = (
    "Keys of a recipe: `align recipe --explain train.learning_rate` for one, docs/recipe-keys.md for all; "
    "`align recipe` prints a commented recipe."
)
TASK = option("task", nargs="?", default="preference", choices=tuple(TASKS), metavar="TASK", help=f"{', '.join(TASKS)}")

COMMANDS = (
    Command(
        "init",
        "write a commented recipe for your own model and rows",
        "align.recipe.init:print_init",
        (
            TASK,
            option("--model", default=MODEL, metavar="M", help="a local folder or a hub name"),
            option("--data", default=DATA, metavar="ROWS", help="a file, a folder or a hub data set"),
            option("--output", dest="file", metavar="FILE", help="the recipe's file (default TASK.yaml)"),
        ),
        light=True,
    ),
    Command(
        "recipe",
        "print the commented recipe of a task, the JSON schema of recipes for editors, or what a key is",
        "align.recipe.show:print_recipe",
        (
            TASK,
            option("--schema", action="store_true", help="the JSON schema in place of a recipe"),
            option("--explain", metavar="KEY", help="type, default and meaning of a key such as train.learning_rate"),
        ),
        light=True,
    ),
)
