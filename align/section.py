"""The base of every recipe section.

Sections stand in modules of their own (`config.py` of a room, `settings.py`), which import neither torch nor what is
built on it: a typo in a recipe is answered before those are loaded.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Base of every recipe section: frozen, refuses unknown keys, attribute docstrings are the field descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def named(default: str) -> BeforeValidator:
    """Lets one of several sections be given by its name alone, and the default's keys without a name."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": default, **value} if isinstance(value, dict) else value

    return BeforeValidator(read)
