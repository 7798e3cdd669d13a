"""The base of every recipe section.

Sections stand in modules of their own (`config.py` of a room, `settings.py`), which import neither torch nor what is
built on it: a typo in a recipe is answered before those are loaded.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


@dataclass(frozen=True)
class Free:
    """Marks a key that does not change what a run gives: it may change on a begun one. A key without it may not."""

    unless: str | None = None
    """A key beside it that, where it is set, makes this one count."""


@dataclass(frozen=True)
class Grows:
    """Marks a key that may become larger on a begun run, where what was done would have been done as well then."""


Fraction = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Base of every recipe section: frozen, refuses unknown keys, attribute docstrings are the field descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def keys_marked(section: BaseModel, mark: type, path: str = "") -> frozenset[str]:
    """Dotted keys of a section, and of those in it, that carry a mark."""
    found: set[str] = set()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        marks = [one for one in field.metadata if isinstance(one, mark)]
        if marks and not ((unless := getattr(marks[0], "unless", None)) and getattr(section, unless)):
            found.add(path + name)
        elif isinstance(value, BaseModel):
            found |= keys_marked(value, mark, f"{path}{name}.")
    return frozenset(found)


def named(default: str) -> BeforeValidator:
    """Lets one of several sections be given by its name alone, and the default's keys without a name."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": default, **value} if isinstance(value, dict) else value

    return BeforeValidator(read)
