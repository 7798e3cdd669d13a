"""The base of every recipe section.

Sections stand in modules of their own (`config.py` of a room, `settings.py`), which import neither torch nor what is
built on it: a typo in a recipe is answered before those are loaded.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PositiveFloat,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class Free:
    """Marks a key that does not change what a run gives: it may change on a begun one. A key without it may not."""

    unless: tuple[str, ...] = ()
    """Keys beside it, any of which, where it is set, makes this one count."""

    def holds(self, section: BaseModel) -> bool:
        """Whether the key is free in a section."""
        return not any(getattr(section, key) for key in self.unless)


@dataclass(frozen=True)
class Grows:
    """Marks a key that may become larger on a begun run, where what was done would have been done as well then."""


Fraction = Annotated[float, Field(ge=0, lt=1)]
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def read_seconds(value: Any) -> Any:
    """`3h50m`, `90m`, `1d` and Slurm's `1-03:50:00` or `03:50:00` in seconds; a number is of seconds."""
    if not isinstance(value, str):
        return value
    text = re.sub(r"\s", "", value.lower())
    if clock := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)", text):
        return sum(int(part or 0) * size for part, size in zip(clock.groups(), UNITS.values(), strict=True))
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?", text)
    if not text or not parts:
        raise ValueError(f"`{value}` is no time; write it as 3h50m, 90m or 1d, or Slurm's 1-03:50:00")
    return sum(int(part or 0) * size for part, size in zip(parts.groups(), UNITS.values(), strict=True))


Duration = Annotated[
    PositiveFloat,
    Field(allow_inf_nan=False),
    BeforeValidator(read_seconds, json_schema_input_type=PositiveFloat | str),
]


class Strict(BaseModel):
    """Base of every recipe section: frozen, refuses unknown keys, attribute docstrings are what its schema says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for key, text in key_docs(cls).items():
            properties[key]["description"] = text
        return schema


def key_docs(section: type[BaseModel]) -> dict[str, str]:
    """The string below each key of a section, as its class and those above have it.

    Read from the source when somebody asks: pydantic would read all of it at import, a third of the time of a typo.
    """
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        try:
            lines = textwrap.dedent(inspect.getsource(cls)) if issubclass(cls, Strict) else "class _: ..."
        except (OSError, TypeError):  # typed in, so that there is no file
            continue
        (node,) = ast.parse(lines).body
        for key, below in pairwise(getattr(node, "body", ())):
            match key, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return {name: text for name, text in found.items() if name in section.model_fields}


def known_keys(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key that a section can hold, whichever of several sections stands at a key."""
    for name, field in section.model_fields.items():
        yield (*path, name)
        for below in _sections(field.annotation):
            yield from known_keys(below, (*path, name))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a key's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def keys_marked(section: BaseModel, mark: type, path: str = "") -> frozenset[str]:
    """Dotted keys of a section, and of those in it, that carry a mark."""
    found: set[str] = set()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        marks = [one for one in field.metadata if isinstance(one, mark)]
        if marks and (not isinstance(marks[0], Free) or marks[0].holds(section)):
            found.add(path + name)
        elif isinstance(value, BaseModel):
            found |= keys_marked(value, mark, f"{path}{name}.")
    return frozenset(found)


@dataclass(frozen=True)
class Named:
    """Lets one of several sections be given by its name alone, and the default's keys without a name."""

    default: str
    text_is: str = "name"
    """The key of the default that a text alone stands for; `name`, of any of them."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._read, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """What `align recipe --schema` makes of it stands in the schema under our own word."""
        return handler(core) | {"named": {"default": self.default, "text_is": self.text_is}}

    def _read(self, value: Any) -> Any:
        value = {self.text_is: value} if isinstance(value, str) else value
        return {"name": self.default, **value} if isinstance(value, dict) else value
