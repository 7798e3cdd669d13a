"""A plan as a commented recipe."""

from typing import Any

from align.importing.plan import Line, Plan, in_flow

SECTIONS = ("policy", "data", "train")
"""Sections that are written key by key; others stand on one line."""
ORDER = ("task", "output", "policy", "reference", "data", "score", "objective", "wpo", "train", "sampling")
WIDTH = 118


def recipe_text(plan: Plan, to: str) -> str:
    """The recipe's text.

    Args:
        to: the file that it is for, named in its head.
    """
    text = [
        f"# Imported from {plan.file.name} of {plan.tool}.",
        f"#   align inspect {to}        the audit of the rows, and how they become tokens; no training",
        f"#   align train {to}",
    ]
    top = [key for key in plan.tree if key.partition(".")[0] == key]
    for name in ORDER:
        below = [key for key in plan.tree if key.startswith(f"{name}.")]
        if name in SECTIONS and below:
            text += ["", f"{name}:"]
            for key in below:
                text += _entry(key.partition(".")[2], plan.tree[key], plan.comments.get(key, ""), "  ")
        elif name in top:
            text += ([""] if name in ("score", "sampling") else []) + _entry(
                name, plan.tree[name], plan.comments.get(name, ""), ""
            )
    return "\n".join([*text, *_dropped(plan.lines)]) + "\n"


def _entry(key: str, value: Any, comment: str, indent: str) -> list[str]:
    """A key with its comment behind it, or above it where that is long."""
    lines = [f"{indent}{key}: {in_flow(value)}"]
    if isinstance(value, list) and len(value) > 1 and isinstance(value[0], dict):
        lines = [f"{indent}{key}:", *(f"{indent}  - {in_flow(one)}" for one in value)]
    if not comment:
        return lines
    if len(lines) == 1 and len(lines[0]) + len(comment) + 4 <= WIDTH and ":" not in comment:
        return [f"{lines[0]}  # {comment}"]
    return [f"{indent}# {comment}", *lines]


def _dropped(lines: list[Line]) -> list[str]:
    found = [line for line in lines if line.verdict == "dropped"]
    if not found:
        return []
    said = [
        f"#   {', '.join(line.names)}: {line.value}{' (numbers differ)' * line.differs}: {line.why}" for line in found
    ]
    return ["", "# Dropped:", *said]


def report(plan: Plan) -> str:
    """What became of every key."""
    counts = {verdict: len(names_of(plan, verdict)) for verdict in VERDICTS}
    text = []
    for verdict in VERDICTS:
        for line in plan.lines:
            if line.verdict == verdict:
                ours = f" -> {line.ours}" if line.ours else ""
                marked = "; numbers differ" if line.differs else ""
                why = f" ({line.why}{marked})" if line.why else ""
                text.append(f"  {verdict:8}{', '.join(line.names)}: {line.value}{ours}{why}")
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([f"{plan.file}: keys of {plan.tool}: {said}", *text])


VERDICTS = ("kept", "changed", "dropped")


def names_of(plan: Plan, verdict: str) -> list[str]:
    """The file's keys of a verdict, each once: one that is kept in part and changed in part is changed."""
    order = ("changed", "kept", "dropped")
    found: dict[str, int] = {}
    for line in plan.lines:
        for name in line.names:
            found[name] = min(found.get(name, len(order)), order.index(line.verdict))
    return [name for name, place in found.items() if order[place] == verdict]
