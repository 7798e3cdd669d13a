"""`align recipe`: the commented recipe of a task, the schema for editors, or what one key is."""

import json
from pathlib import Path

from align.recipe.init import recipe_of
from align.recipe.keys import explain_key
from align.recipe.written import written_schema


def print_recipe(task: str, *, schema: bool = False, explain: str | None = None) -> None:
    """Print one of the three.

    Args:
        task: a name of `align.recipe.init.TASKS`.
        explain: a dotted key.

    Raises:
        UserError: there is no such key.
    """
    if schema:
        print(json.dumps(written_schema(), indent=1, ensure_ascii=False))
    elif explain is not None:
        print(explain_key(explain))
    else:
        print(recipe_of(task, Path(f"{task}.yaml")), end="")
