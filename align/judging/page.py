"""The page of an evaluation: figures with intervals, and the samples whose judge changed its mind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.files import write_text
from align.judging.cases import Case
from align.judging.figures import differences
from align.judging.judges import Opinion
from align.judging.tables import SIDES, sentences
from align.report.measured import RATES
from align.report.page import page_parts, templates
from rewards.texts import plain

SHOWN = 10
"""Prompts of each kind."""


@dataclass(frozen=True)
class Shown:
    """One prompt with the comparison that its judge is surest of."""

    prompt: str
    policy: str
    against: str
    gap: float


def write_page(path: Path, figures: dict[str, Any], cases: Sequence[Case], opinions: Sequence[Opinion]) -> None:
    """Write the page of these figures; everything from a file is escaped by the template engine."""
    sides = next(iter(cases[0].pairs))
    every = [
        Shown(plain(case.row.prompt), case.text(a), case.text(b), gap)  # type: ignore[arg-type]
        for gap, case, (a, b) in differences(cases, opinions, sides)
    ]
    worse, better = [own for own in every if own.gap < 0], [own for own in every if own.gap > 0]
    page = (
        templates()
        .get_template("evaluation.html.jinja")
        .render(
            title=f"{figures['policy']} against {figures['against']}",
            kind="Align evaluation",
            **page_parts(),
            figures=figures,
            rates=RATES,
            of_sides=[(key, label, pattern) for key, label, pattern in SIDES if figures[key] is not None],
            facts=list(sentences(figures, "")),
            kinds={
                f"The other side is better ({len(worse)} prompts)": worse[:SHOWN],
                f"The policy is better ({len(better)} prompts)": better[::-1][:SHOWN],
            },
        )
    )
    write_text(path, page)
