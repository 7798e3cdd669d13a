"""What ships besides code: recipes, chat templates, and the data and models of the quick start.

In a checkout they lie beside the package, in an installed wheel inside it (setup.py puts them there). A path such as
`recipes/dpo.yaml` or `data/story-policy` therefore works from every folder; a file of the user's own goes first.
"""

from pathlib import Path
from typing import Any

from align.files import is_there, with_home

PACKAGE = Path(__file__).parent
FOLDERS = ("recipes", "data")


def shipped(path: str) -> Path | None:
    """Where a path that begins with `recipes/` or `data/` ships; None if it does not."""
    if path.split("/")[0] not in FOLDERS or ".." in path:
        return None
    places = (PACKAGE / "share" / path, PACKAGE.parent / path)
    return next((place for place in places if is_there(place)), None)


def names(folder: str, suffix: str) -> list[str]:
    """What ships in a folder, by name without the suffix."""
    where = shipped(folder)
    return sorted(file.name.removesuffix(suffix) for file in where.glob(f"*{suffix}")) if where else []


def recipe_file(name: str | Path) -> Path:
    """The file of a recipe: the user's own, or by its path or name one that ships; else the path as it was given."""
    own = Path(name)
    if is_there(own, Path.is_file):
        return own
    return shipped(str(name)) or shipped(f"recipes/{name}.yaml") or own


def template_file(name: str | Path) -> Path:
    """The same for a chat template: `plain`, or a path."""
    own = with_home(str(name))
    if is_there(own, Path.is_file):
        return own
    return shipped(str(name)) or shipped(f"recipes/templates/{name}.jinja") or own


def with_shipped_paths(tree: Any) -> Any:
    """A recipe in which paths that ship, and that are not in the current folder, are where they are."""
    if isinstance(tree, dict):
        return {key: with_shipped_paths(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_shipped_paths(value) for value in tree]
    if isinstance(tree, str) and tree.startswith("data/") and not is_there(Path(tree)):
        return str(shipped(tree) or tree)
    return tree
