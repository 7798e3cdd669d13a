"""OpenAssistant's conversations: trees of messages of which each has several answers, ranked by people."""

from collections.abc import Iterator
from typing import Any

from align.data.bad_row import kind
from align.data.columns import Columns
from align.data.formats.base import FORMAT, Format, of_list
from align.data.schema import LEFT_OUT, BadRow, UnusableRow

ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}
OF_A_MESSAGE = ("message_id", "text", "role")
UNRANKED = "answers without ranks"


@FORMAT.add
class OasstTree(Format):
    """A tree of messages, under `prompt` or by itself: the answers to each of a user's messages are one list, by `rank`
    (0 is the best). An answer that was deleted, or has no rank beside one that has, is left out, and the row says how
    many.

    Source: OpenAssistant/oasst1 and oasst2, files `*.trees.jsonl.gz`; LAION-AI/Open-Assistant, `en_100_message.jsonl`
    """

    name = "oasst_tree"
    shape = "{message_tree_id, prompt: {text, role, replies: [{text, role, rank, replies}]}}"
    published = "OpenAssistant message trees"
    splits = True
    any_of = ("message_tree_id", "replies")
    before = ("completion",)

    @classmethod
    def detect(cls, columns: Columns) -> bool:
        below = isinstance(columns.get("prompt"), dict) and "message_tree_id" in columns
        return below or ("replies" in columns and all(name in columns for name in OF_A_MESSAGE))

    @staticmethod
    def read(columns: Columns) -> Columns:
        remedy = "give the file itself, so that each of them becomes a row"
        raise BadRow("prompt", "a tree, which holds several lists", remedy)

    @classmethod
    def split(cls, columns: Columns) -> list[Columns | UnusableRow]:
        below = "prompt" in columns
        about = {name: value for name, value in columns.items() if below and name != "prompt" and value is not None}
        found = _lists(columns["prompt"] if below else columns, [], "prompt" if below else "")
        rows = [_beside(about, own) if isinstance(own, dict) else own for own in found]
        return rows or [UnusableRow("a tree without an answer")]


@FORMAT.add
class OasstMessages(Format):
    """A message of such a tree in a row of its own; neighbouring rows of one tree become the tree.

    Source: OpenAssistant/oasst1 and oasst2, files `*.messages.jsonl.gz` and the hub's tables
    """

    name = "oasst_messages"
    shape = "{message_id, parent_id, text, role, rank, message_tree_id}"
    published = "OpenAssistant messages"
    needs = ("message_tree_id", *OF_A_MESSAGE)
    numbers = ("rank",)
    joins = ("message_tree_id",)

    @staticmethod
    def read(columns: Columns) -> Columns:
        raise BadRow("message_id", "a message of a tree", "give the file itself, so that each tree is put together")

    @classmethod
    def joined(cls, rows: list[Columns]) -> Columns:
        nodes = {str(row["message_id"]): {**row, "replies": []} for row in rows}
        roots = [node for node in nodes.values() if node.get("parent_id") is None]
        if len(roots) != 1:
            raise UnusableRow(f"a tree with {len(roots)} first messages among its neighbouring rows")
        lost = 0
        for node in nodes.values():
            above = nodes.get(str(node.get("parent_id")))
            if above is not None:
                above["replies"].append(node)
            lost += above is None and node is not roots[0]
        tree = {"message_tree_id": rows[0]["message_tree_id"], "prompt": roots[0], **of_list(rows)}
        return {**tree, **({"meta": {"messages_without_parent": lost}} if lost else {})}


def _beside(about: Columns, row: Columns) -> Columns:
    """A row with what is said of its tree; what was found on the way is no column of the file, and so `meta`."""
    both = [own["meta"] for own in (about, row) if isinstance(own.get("meta"), dict)]
    return {**about, **row, **({"meta": {key: own for meta in both for key, own in meta.items()}} if both else {})}


def _lists(node: Any, before: list[Columns], where: str) -> Iterator[Columns | UnusableRow]:
    """A row for each message of the user's in a tree that was answered, depth first."""
    message = _message(node, where)
    conversation = [*before, message]
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise BadRow(_below(where, "replies"), f"{kind(replies)}, not a list", "give the replies to the message")
    places = {id(reply): _below(where, f"replies[{k}]") for k, reply in enumerate(replies)}
    answers = [own for own in replies if _message(own, places[id(own)])["role"] == "assistant"]
    if message["role"] == "user" and answers:
        yield _list(node, conversation, answers, places)
    for reply in replies:
        yield from _lists(reply, conversation, places[id(reply)])


def _list(
    node: Columns, conversation: list[Columns], answers: list[Columns], places: dict[int, str]
) -> Columns | UnusableRow:
    present = [own for own in answers if not own.get("deleted")]
    ranked = [own for own in present if own.get("rank") is not None]
    for own in ranked:
        if isinstance(own["rank"], bool) or not isinstance(own["rank"], int | float):
            raise BadRow(f"{places[id(own)]}.rank", f"{kind(own['rank'])}, not a number", "give 0 for the best answer")
    if not present or (len(present) > 1 and not ranked):
        return UnusableRow(UNRANKED if present else "answers that were deleted")
    used = ranked or present
    row: Columns = {"id": node.get("message_id"), "messages": conversation}
    row["items"] = [{key: own[key] for key in ("text", "rank") if own.get(key) is not None} for own in used]
    left_out = len(answers) - len(used)
    return {**row, **({"meta": {LEFT_OUT: left_out}} if left_out else {})}


def _message(node: Any, where: str) -> Columns:
    if not isinstance(node, dict):
        raise BadRow(where, f"{kind(node)}, not a message", "give an object with `text`, `role` and `replies`")
    role, text = ROLES.get(str(node.get("role"))), node.get("text")
    if role is None or not isinstance(text, str):
        named = "role" if role is None else "text"
        raise BadRow(
            _below(where, named), f"{node.get(named)!r}", "give `text`, and `prompter` or `assistant` as `role`"
        )
    return {"role": role, "content": text}


def _below(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
