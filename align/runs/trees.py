"""Recipes as trees of dictionaries: a value by its dotted key, and where two differ."""

from typing import Any


def value_at(tree: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def differing_keys(old: Any, new: Any, path: str = "") -> set[str]:
    """Dotted keys at which two trees of dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        below = [differing_keys(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in old.keys() | new.keys()]
        return set().union(*below)
    return set() if old == new else {path}
