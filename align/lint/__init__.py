"""Checks of preference data before anything is trained: one class each, in a module of this folder.

To add a check, write a module with its class: nothing else has to know of it. See `base.Check`. They know texts only;
`align.data.linting` makes texts of rows.
"""

from typing import TYPE_CHECKING, Literal

from align.lint.base import CHECK, Check, Finding, TextRow, look
from align.registry import import_all

import_all(__name__, __path__)
CHECK.classes = dict(sorted(CHECK.classes.items()))

CHEAP = tuple(name for name, own in CHECK.classes.items() if own.cheap)
"""Those that every run can afford."""

if TYPE_CHECKING:
    CheckName = str
else:
    CheckName = Literal[tuple(CHECK.classes)]
    """The name of any check, for use as a pydantic field."""

__all__ = ["CHEAP", "CHECK", "Check", "CheckName", "Finding", "TextRow", "look"]
