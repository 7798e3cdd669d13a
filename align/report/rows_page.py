"""A page of a few rows, each token coloured by what training does with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from align.report.page import page_parts, templates
from align.report.tokens import visible

Role = Literal["prompt", "learnt", "weighed", "context", "scored"]

MEANING: dict[Role, str] = {
    "prompt": "read, not learnt",
    "learnt": "what training makes more or less likely",
    "weighed": "learnt, with another weight than 1",
    "context": "inside a completion, read and not learnt: of a tool, a user, the template, a message of weight 0",
    "scored": "read by the reward model",
}


@dataclass(frozen=True)
class ShownToken:
    """A token as its page and the terminal show it."""

    text: str
    """What it adds to the text before it."""
    id: int
    role: Role
    weight: float | None = None
    """Of a learnt one."""


@dataclass(frozen=True)
class ShownCompletion:
    grade: float
    tokens: list[ShownToken]

    def count(self, *roles: Role) -> int:
        """Its tokens of these roles."""
        return sum(token.role in roles for token in self.tokens)


@dataclass(frozen=True)
class ShownRow:
    """A list, or an online run's prompt without completions."""

    id: str
    place: str
    prompt: list[ShownToken]
    completions: list[ShownCompletion]

    def roles(self) -> set[Role]:
        """What its tokens are."""
        return {token.role for own in (self.prompt, *(c.tokens for c in self.completions)) for token in own}


def render_rows(title: str, rows: Sequence[ShownRow], facts: Mapping[str, str]) -> str:
    """The page of these rows; everything from a file is escaped by the template engine.

    Args:
        title: its name, mostly the recipe's.
        rows: as they are shown in the terminal.
        facts: what the audit says, by name.
    """
    there = {role for row in rows for role in row.roles()}
    return (
        templates()
        .get_template("rows.html.jinja")
        .render(
            title=title,
            kind="Align rows",
            rows=rows,
            facts=facts,
            meaning={role: words for role, words in MEANING.items() if role in there},
            visible=visible,
            **page_parts(),
        )
    )
