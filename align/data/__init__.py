"""From sources to token ids: `prepare_data` does it all, the modules do it step by step."""

from align.data.audit import Audit, in_one_line, render
from align.data.prepare import Prepared, prepare_data
from align.data.schema import Row
from align.data.sources import Source, read_source, stream_rows
from align.data.texts import prompt_text, read_chat_template
from align.data.tokenize import encode_prompt

__all__ = [
    "Audit",
    "Prepared",
    "Row",
    "Source",
    "encode_prompt",
    "in_one_line",
    "prepare_data",
    "prompt_text",
    "read_chat_template",
    "read_source",
    "render",
    "stream_rows",
]
