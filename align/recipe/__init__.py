"""The recipe: what a run does, from YAML and the command line to checked sections."""

from align.recipe.recipe import Recipe, SourceSection, dump_recipe, load_recipe, parse_recipe, recipe_keys

__all__ = ["Recipe", "SourceSection", "dump_recipe", "load_recipe", "parse_recipe", "recipe_keys"]
