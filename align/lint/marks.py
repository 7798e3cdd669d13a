"""Marks of a chat template, or of a dialogue, that stand in the text."""

import re
from collections import Counter
from collections.abc import Sequence

from align.lint.base import CHECK, Check, Finding, TextRow, share

TEMPLATE = re.compile(
    r"<\|(?:im_start|im_end|im_sep|start_header_id|end_header_id|eot_id|begin_of_text|end_of_text|endoftext|user|assistant"
    r"|system|end|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN|channel|message|return)\|>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<[｜|](?:User|Assistant|begin▁of▁sentence|end▁of▁sentence)[｜|]>"
    r"|^### ?(?:Instruction|Response|Human|Assistant|Input) ?:|</?s>",
    re.MULTILINE,
)
HINTS = ("<|", "<\uff5c", "INST]", "SYS>>", "_of_turn>", "###", "<s>", "</s>")
"""Any text with a mark has one of these; looking for them is a tenth of the work."""
SPEAKER = re.compile(
    r"^[ \t]{0,3}(?:\*\*)?(?:Human|User|Assistant|AI|Bot|Customer|Agent|System|Question|Q|A)(?:\*\*)? ?:", re.MULTILINE
)


@CHECK.add
class TemplateMarks(Check):
    """Marks of a chat template in the text itself (`<|im_start|>`, `[INST]`, `### Response:`): a plain row that was
    rendered for another model, or messages that were rendered twice."""

    name = "template_marks"
    bad = "any row has one"

    @classmethod
    def find(cls, rows: Sequence[TextRow]) -> Finding | None:
        found: Counter[str] = Counter()
        inside = {"prompts": 0, "completions": 0}
        places = []
        for row in rows:
            asked = marks_of(row.prompt)
            answered: set[str] = set().union(*map(marks_of, row.completions))
            inside["prompts"] += bool(asked)
            inside["completions"] += bool(answered)
            found.update(sorted(asked | answered))
            places += [row.place] * bool(asked | answered)
        if not places:
            return None
        marks = ", ".join(f"{mark} ({count})" for mark, count in found.most_common(4))
        plain = not all(row.chat for row in rows)
        words = f"{share(len(places), len(rows))} rows have marks of a chat template in their text: {marks}; "
        words += f"in the prompt of {inside['prompts']}, in a completion of {inside['completions']}"
        words += ". Give such rows as messages, and the model's own template writes its marks" if plain else ""
        figures = {"rows": len(rows), "share": len(places) / len(rows)}
        return cls.finding(words, figures, bad=True, places=places)


def marks_of(text: str) -> set[str]:
    """The different marks of chat templates in a text."""
    return set(TEMPLATE.findall(text)) if any(hint in text for hint in HINTS) else set()


@CHECK.add
class RoleMarks(Check):
    """Completions with a line that begins as another speaker does (`Human:`, `Q:`): text that goes on after its
    answer, or a name before it that the policy would learn to write."""

    name = "role_marks"
    bad = "a hundredth of the completions have one"

    @classmethod
    def find(cls, rows: Sequence[TextRow]) -> Finding | None:
        found: Counter[str] = Counter()
        places, count, completions = [], 0, 0
        for row in rows:
            own = [{match[0].strip(" *:") for match in SPEAKER.finditer(text)} for text in row.completions]
            found.update(mark for marks in own for mark in sorted(marks))
            completions += len(own)
            count += sum(map(bool, own))
            places += [row.place] * any(own)
        if not count:
            return None
        marks = ", ".join(f"{mark}: ({times})" for mark, times in found.most_common(4))
        words = f"{share(count, completions)} completions have a line that begins as a speaker does: {marks}"
        figures = {"completions": completions, "share": count / completions}
        return cls.finding(words, figures, bad=count >= 0.01 * completions, places=places)
