"""The JSON schema of a recipe as it may be written, for editors.

pydantic's own is of what is read: a choice given by its name alone, or one source without brackets, is none there.
"""

from typing import Any

from align.recipe.keys import class_of
from align.recipe.recipe import WITH_SOURCES, Recipe

Schema = dict[str, Any]


def written_schema() -> Schema:
    """JSON schema (draft 2020-12) that holds for each recipe file; YAML's `5e-7` is a number there, as in YAML 1.2."""
    schema = Recipe.model_json_schema()
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        properties = section.get("properties", {})
        for key in _several(name) & properties.keys():
            if "items" in properties[key]:
                properties[key] = _one_or_several(properties[key])
    written = _with_names(schema)
    marked = {"type": "array", "items": {"type": "string"}, "description": "Keys that suit the recipe's own rows."}
    written["properties"][WITH_SOURCES] = marked
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **written, "title": "A recipe of align"}


def _several(name: str) -> set[str]:
    """The keys of a section that take one where they hold several: what a validator before pydantic's own is for."""
    validators = class_of(name).__pydantic_decorators__.field_validators.values()
    return {key for one in validators if one.info.mode == "before" for key in one.info.fields}


def _one_or_several(value: Schema) -> Schema:
    """A list, or one of its items, each by a text too: the name of a choice, or a path."""
    items = value["items"]
    text = {"enum": list(items["discriminator"]["mapping"])} if "discriminator" in items else {"type": "string"}
    items = {"anyOf": [text, items]}
    return {"description": value["description"], "anyOf": [items, {**value, "items": items}]}


def _with_names(node: Any) -> Any:
    """The schema in which each choice among sections says how they are told apart, and which may stand by a name."""
    if isinstance(node, list):
        return [_with_names(one) for one in node]
    if not isinstance(node, dict):
        return node
    written = {key: _with_names(value) for key, value in node.items() if key not in ("discriminator", "named")}
    if "discriminator" not in node:
        if "named" in node:  # one section, whose name is one of many
            written["anyOf"] = [{"$ref": written.pop("$ref")}, {"type": "string"}]
        return written
    choices = node["discriminator"]["mapping"]
    del written["oneOf"]
    written["anyOf"] = [{"$ref": choice, "required": ["name"]} for choice in choices.values()]
    if named := node.get("named"):
        written["anyOf"].append({"$ref": choices[named["default"]]})
        written["anyOf"].append({"enum": list(choices)} if named["text_is"] == "name" else {"type": "string"})
    return written
