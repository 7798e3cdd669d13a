"""The formats that rows may have: one class each, in a module of this folder, and `read_row`, which reads any of them.

To add a format, write a module with its class: nothing else has to know of it. See `base.Format`.
"""

from align.data.formats.base import FORMAT, Format, in_order
from align.data.formats.reading import find_format, read_prompt, read_row
from align.registry import import_all

import_all(__name__, __path__)
FORMAT.classes = in_order(FORMAT.classes)

__all__ = ["FORMAT", "Format", "find_format", "read_prompt", "read_row"]
