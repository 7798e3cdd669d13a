"""What the schema says of a recipe's keys: for `align recipe --explain` and for the page docs/recipe-keys.md."""

import difflib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel

from align.errors import UserError
from align.recipe.other_tools import counterpart
from align.recipe.recipe import Recipe, recipe_keys

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
MARKS = {"Free": "May change on a begun run.", "Grows": "May grow on a begun run."}
WORDS = {"string": "text", "integer": "whole number", "boolean": "`true` or `false`", "object": "mapping"}


def sections_of(value: Any) -> list[str]:
    """Names of the definitions that a key's value may be."""
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
        return own + [name for key, part in value.items() if key != "discriminator" for name in sections_of(part)]
    return [name for part in value for name in sections_of(part)] if isinstance(value, list) else []


def class_of(name: str) -> type[BaseModel]:
    """The class of a definition."""

    def below(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield cls
        for one in cls.__subclasses__():
            yield from below(one)

    return next(cls for cls in below(BaseModel) if cls.__name__ == name and cls.__module__.startswith(("align", "rew")))


def default_of(value: dict[str, Any], required: bool) -> str:
    """What a key is where nobody sets it."""
    if required:
        return "**must be given**"
    default = value.get("default")
    if default is None or default in ([], {}, ""):
        return "none"
    if isinstance(default, dict):
        name = default.get("name")
        return f"`{name}`" if name else "as there"
    text = yaml.safe_dump(default, default_flow_style=True, width=1000).splitlines()[0]
    return f"`{text}`"


def type_of(value: dict[str, Any], say: Callable[[list[str]], str]) -> str:
    """What a key takes; `say` names the sections among it."""
    if names := sections_of(value):
        return f"{'list of ' if value.get('type') == 'array' else ''}{say(names)}"
    if "anyOf" in value:
        return " or ".join(type_of(one, say) for one in value["anyOf"] if one.get("type") != "null")
    if "enum" in value or "const" in value:
        return " or ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        items = value.get("items") or (value.get("prefixItems") or [{}])[0]
        return f"list of {type_of(items, say)}"
    bounds = [f"{sign} {value[name]:g}" for name, sign in BOUNDS.items() if name in value]
    kind = value.get("type", "anything")
    return " ".join([WORDS.get(kind, kind), " and ".join(bounds)]).strip()


def said_of(cls: type[BaseModel], key: str, value: dict[str, Any]) -> str:
    """What the key is for, and whether it may change later."""
    marks = [MARKS[type(mark).__name__] for mark in cls.model_fields[key].metadata if type(mark).__name__ in MARKS]
    return " ".join([*value.get("description", "").split(), *marks])


Schemas = dict[str, dict[str, Any]]
"""Class of a section -> its schema."""


def explain_key(key: str) -> str:
    """One key as the page of keys has it, in each section that may stand there; of a section its keys too.

    Raises:
        UserError: there is no such key; with the nearest.
    """
    schemas = _schemas()
    asked = key.partition("=")[0]
    *parents, last = parts = [part for part in asked.split(".") if not part.isdigit()] or [""]
    owners = ["Recipe"]
    for part in parents:
        owners = _below(owners, part, schemas)
    if last == "name" and any(_choice(owner, schemas) for owner in owners):
        return explain_key(".".join(parents))  # which lists the names
    texts: dict[str, list[str]] = {}
    for owner in (owner for owner in owners if last in schemas[owner]["properties"]):
        texts.setdefault(_entry(owner, last, schemas), []).append(owner)
    if not texts:
        texts = {
            _prose(schemas[owner], [owner], schemas): [owner] for owner in owners if _choice(owner, schemas) == last
        }
    if not texts:
        raise UserError(f"there is no key `{asked}` in a recipe{_nearest(parts)}")
    return f"{asked}\n" + "\n\n".join(f"{text}\n{_source(owners, schemas)}" for text, owners in texts.items())


@cache
def _schemas() -> Schemas:
    schema = Recipe.model_json_schema()
    return {"Recipe": schema, **schema["$defs"]}


def _below(owners: Sequence[str], part: str, schemas: Schemas) -> list[str]:
    """The sections that a key of some sections may hold; or those of them that a name chooses."""
    values = [schemas[owner]["properties"][part] for owner in owners if part in schemas[owner]["properties"]]
    below = list(dict.fromkeys(name for value in values for name in sections_of(value)))
    return below or [owner for owner in owners if _choice(owner, schemas) == part]


def _choice(owner: str, schemas: Schemas) -> str:
    """The `name` that chooses a section; empty where it is no choice."""
    return schemas[owner]["properties"].get("name", {}).get("const", "")


def _entry(owner: str, key: str, schemas: Schemas) -> str:
    """Type, default and words of a key, and what stands below it."""
    value = schemas[owner]["properties"][key]

    def said(names: list[str]) -> str:
        return (
            "a section" if len(names) == 1 else f"one of {', '.join(f'`{_choice(name, schemas)}`' for name in names)}"
        )

    default = default_of(value, key in schemas[owner].get("required", ())).replace("**", "")
    takes = f"{type_of(value, said)}; {default if default == 'must be given' else f'by default {default}'}"
    what = {"description": said_of(class_of(owner), key, value)}
    return "\n".join(filter(None, [_indented(takes), _prose(what, sections_of(value), schemas)]))


def _prose(section: dict[str, Any], below: Sequence[str], schemas: Schemas) -> str:
    """What is said of a key or section, and the keys of the one section that may stand there."""
    lines = [_indented(" ".join(section.get("description", "").split()))] if section.get("description") else []
    if len(below) == 1 and (keys := [f"`{key}`" for key in schemas[below[0]]["properties"]]):
        lines.append(_indented(f"Its keys: {', '.join(keys)}"))
    return "\n".join(lines)


def _source(owners: Sequence[str], schemas: Schemas) -> str:
    """Where a key stands in the code, and with which choices it is there."""
    choices = [f"`{choice}`" for owner in owners if (choice := _choice(owner, schemas))]
    files = dict.fromkeys(f"{class_of(owner).__module__.replace('.', '/')}.py" for owner in owners)
    where = f"From {', '.join(owners)} in {', '.join(files)}"
    return _indented(f"With {', '.join(choices)}. {where}" if choices else where)


def _indented(text: str) -> str:
    return textwrap.fill(text, width=100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _nearest(parts: Sequence[str]) -> str:
    """What was probably meant by a key that is none: another tool's word, or the nearest of ours."""
    keys = sorted(recipe_keys(), key=lambda key: (key.count("."), key))
    if elsewhere := counterpart(".".join(parts)):
        return f"; {elsewhere}"
    whole = difflib.get_close_matches(".".join(parts), keys, n=1, cutoff=0.8)
    last = difflib.get_close_matches(parts[-1], {key.rpartition(".")[2] for key in keys}, n=1)
    meant = whole or [key for key in keys if key.rpartition(".")[2] in last][:3]
    if not meant:
        return "; give one such as `train` or `train.learning_rate`"
    return f"; did you mean {' or '.join(f'`{key}`' for key in meant)}?"
