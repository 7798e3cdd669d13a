"""From sources to token ids: `prepare_data` does it all, the modules do it step by step."""

from typing import TYPE_CHECKING

from align.lazy import lazily

if TYPE_CHECKING:
    from align.data.audit import Audit, in_one_line, render
    from align.data.prepare import Prepared, Wanted, prepare_data
    from align.data.schema import Row
    from align.data.sources import read_source, stream_rows
    from align.data.texts import prompt_text, read_chat_template
    from align.data.tokenize import encode_prompt

__all__ = [
    "Audit",
    "Prepared",
    "Row",
    "Wanted",
    "encode_prompt",
    "in_one_line",
    "prepare_data",
    "prompt_text",
    "read_chat_template",
    "read_source",
    "render",
    "stream_rows",
]

__getattr__ = lazily(
    __name__,
    {
        "audit": (
            "Audit",
            "in_one_line",
            "render",
        ),
        "prepare": (
            "Prepared",
            "Wanted",
            "prepare_data",
        ),
        "schema": ("Row",),
        "sources": (
            "read_source",
            "stream_rows",
        ),
        "texts": (
            "prompt_text",
            "read_chat_template",
        ),
        "tokenize": ("encode_prompt",),
    },
)
