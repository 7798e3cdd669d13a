"""The recipe: what a run does, from YAML and the command line to checked sections."""

from typing import TYPE_CHECKING

from align.lazy import lazily

if TYPE_CHECKING:
    from align.recipe.recipe import (
        Recipe,
        SourceSection,
        dump_recipe,
        load_recipe,
        parse_recipe,
        read_recipe,
        recipe_keys,
        with_consent,
    )

__all__ = [
    "Recipe",
    "SourceSection",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
    "recipe_keys",
    "with_consent",
]

# `align --help` looks for the list of tasks here, and needs no recipe.
__getattr__ = lazily(__name__, {"recipe": __all__})
