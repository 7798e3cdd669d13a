"""The tools that a row offers, in any spelling, as OpenAI's function schemas.

Sources: OpenAI's Chat Completions (its older `functions` too) and Responses, Anthropic's Messages (`input_schema`) and
Gemini's `functionDeclarations`.
"""

from typing import Any

from align.data.bad_row import BadRow, kind
from align.data.content import parsed, without_nulls

TOOLS = ("tools", "functions")
"""Columns of a row's tools."""
DECLARATIONS = ("functionDeclarations", "function_declarations")
SCHEMAS = ("input_schema", "inputSchema")
"""What others call `parameters`."""
DROPPED = ("cache_control",)
"""What is of a service and not of the tool."""


def read_tools(value: object, where: str) -> list[dict[str, Any]] | None:
    """The tools of a row as `{"type": "function", "function": {"name", ...}}` each; None for none.

    A schema's own keys stay in their order. Entries of null count as absent in objects, which Parquet writes so; a JSON
    text keeps them.

    Args:
        value: a list of objects or of their JSON, or the JSON of the list.
        where: the column, for refusals.

    Raises:
        BadRow: no list, or an entry that is no function.

    Source: ours
    """
    entries = _of_json(value, where)
    if entries is None or isinstance(entries, dict):
        entries = [entries] if entries else []
    if not isinstance(entries, list):
        raise BadRow(where, f"{kind(entries)}, not a list", "give a list of function schemas, or its JSON")
    tools = []
    for k, entry in enumerate(entries):
        own = _of_json(entry, f"{where}[{k}]") if isinstance(entry, str) else entry
        declared = next((own[key] for key in DECLARATIONS if own.get(key)), None) if isinstance(own, dict) else None
        tools += [_tool(one, f"{where}[{k}]") for one in declared or [own]]
    return tools or None


def check_tools(tools: object, prompt: object) -> None:
    """Refuse tools beside a prompt that no chat template is put around.

    Raises:
        BadRow: the prompt is no conversation.
    """
    if tools and not (isinstance(prompt, list) and isinstance(prompt[0], dict)):
        raise BadRow("tools", "tools beside a prompt that is no conversation", "give the prompt as messages")


def _of_json(value: object, where: str) -> Any:
    """JSON text as what it says, and an object without nulls."""
    if not isinstance(value, str):
        return without_nulls(value)
    return parsed(value, where) if value.strip() else []


def _tool(own: object, where: str) -> dict[str, Any]:
    if not isinstance(own, dict):
        raise BadRow(where, f"{kind(own)}, not a tool", "give a function schema with `name` and `parameters`")
    wrapped = isinstance(own.get("function"), dict)
    function = own["function"] if wrapped else {key: one for key, one in own.items() if key not in ("type", *DROPPED)}
    function = {"parameters" if key in SCHEMAS else key: one for key, one in function.items()}
    name, named = function.get("name"), own.get("type", "function")
    if named not in ("function", "custom") or not isinstance(name, str) or not name:
        what = f"a tool of type {named!r}" if named != "function" else f"a tool without a name (keys: {', '.join(own)})"
        raise BadRow(where, what, "give a function schema with `name` and `parameters`")
    around = own if wrapped else {}
    return {**({} if "type" in around else {"type": "function"}), **around, "function": function}
