"""What to say of a key or value that a recipe cannot hold: where it is, and what was probably meant."""

import difflib
import os
import re
from typing import Any

from pydantic import BaseModel

from align.objectives import unknown_objective
from align.recipe.other_tools import VALUES, counterpart
from align.section import known_keys

REWARD_OBJECTIVES = ("bradley_terry", "attributes")
"""Objectives that only a reward model has."""


def explain(error: Any, recipe: type[BaseModel]) -> str:
    """One pydantic error as a sentence with the dotted key and what was probably meant."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(part for part in location if "[" not in part)  # pydantic's literal[...] and tuple[...] of a union
    given = error["input"]
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key `{key}`{_meant(location, given, recipe)}"
        case "value_error":
            return f"`{key}`: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
        case "union_tag_invalid":
            return f"`{key}.name`: {_unknown_name(location, error['ctx'])}"
        case "missing":
            return f"`{key}` is missing"
        case "model_type" | "model_attributes_type":
            remedy = f"`{{name: {given}}}`" if isinstance(given, str) else "a section of keys"
            return f"`{key}`: give {remedy}, not {given!r}"
        case "union_tag_not_found":
            return f"`{key}.name` is missing"
        case "tuple_type":
            return f"`{key}`: give a list such as `[{given}]`, not {given!r}"
    known = re.findall("'([^']+)'", error["msg"]) if error["type"] == "literal_error" else []
    near = _nearest_value(key, str(given), known)
    hint = f"; did you mean `{near}`?" if near else ""
    return f"`{key}`: {error['msg'][0].lower() + error['msg'][1:]}, got {given!r}{hint}"


def _nearest_value(key: str, given: str, known: list[str]) -> str:
    """The one of the values that this key takes that was probably meant, by another tool's word or by its letters."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    paths = [parts, *(parts[:at] + parts[at + 1 :] for at in range(1, len(parts) - 1))]  # without a union's tag
    elsewhere = next((word for path in paths if (word := VALUES.get(".".join(path), {}).get(given))), "")
    return elsewhere or next(iter(difflib.get_close_matches(given, known, n=1)), "")


def _unknown_name(location: list[str], context: dict[str, Any]) -> str:
    tag, names = context["tag"], [name.strip("'") for name in context["expected_tags"].split(", ")]
    near = _nearest_value(".".join([*location, "name"]), tag, names)
    objective = location[0] == "objective"
    if objective and near not in VALUES["objective.name"].values() and near not in REWARD_OBJECTIVES:
        return unknown_objective(tag)
    what = "objective" if objective else "name"
    return f"there is no {what} `{tag}`; " + (f"did you mean `{near}`?" if near else f"take {', '.join(names)}")


def _meant(location: list[str], given: object, recipe: type[BaseModel]) -> str:
    """What an unknown key probably stands for: one of its section's, another tool's word, or the nearest of all."""
    keys = list(dict.fromkeys(known_keys(recipe)))
    if any(path[-1] == location[-1] and path[:1] == tuple(location[:1]) for path in keys):
        return "; it is a key of another `name`, so remove it or set its section whole"
    if elsewhere := counterpart(".".join(location), given):
        return f"; {elsewhere}"

    ratios = {name: difflib.SequenceMatcher(None, name, location[-1]).ratio() for name in {path[-1] for path in keys}}

    def likeness(path: tuple[str, ...]) -> float:
        return ratios[path[-1]]

    def shared(path: tuple[str, ...]) -> int:
        return len(os.path.commonprefix([path[:-1], tuple(location[:-1])]))

    best = max(keys, key=lambda path: likeness(path) + 0.2 * shared(path))
    return f"; did you mean `{'.'.join(best)}`?" if likeness(best) >= (0.5 if shared(best) else 0.7) else ""
