"""Which rows training can learn from: sources are read row by row, graded, and written to disk or counted."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from align.data.audit import Audit, SourceAudit
from align.data.config import DataSection
from align.data.contrast import Templates
from align.data.one_form import one_form
from align.data.row_numbers import ABSENT, WEIGHT
from align.data.row_store import RowWriter
from align.data.schema import ATTRIBUTES, BadRow, Malformed, Row, UnusableRow, changed
from align.data.sources import Source
from align.errors import UserError
from align.progress import stage
from rewards.grading import GradeMethod, grades_from_rewards

INSTEAD_OF_ONE = "give more, or train with `objective: {name: kto}` or `task: sft`"
Owners = dict[str, SourceAudit]
"""Who counts the rows of a file or hub data set."""


@dataclass(frozen=True)
class Wanted:
    """What a task wants of its rows, besides what their section says."""

    min_completions: int = 2
    """2 to learn from preferences (lists without an order are then left out), else 1."""
    imitate: bool = False
    """Of a training list its best completion alone."""
    as_scored: bool = False
    """Completions end as a scorer reads them, whatever `append_eos` says."""
    seed: int = 0
    """Decides what is held out and which completions a reduced list keeps."""
    contrast: Templates | None = None
    """Templates of the two contexts for token rewards, where those are wanted."""
    token_weights: bool = False
    """The rows' own weights of tokens."""
    needs_label: bool = False
    """Whether a lone completion without label, grade or reward is refused; else it counts as good."""
    margins: bool = False
    """Whether the rows' margins are read."""
    instead_of_one: str = INSTEAD_OF_ONE
    """What a user is told to do about a lone completion where two are needed."""
    every_check: bool = False
    """Whether all checks look at the rows, not the cheap ones alone and those of `stop_on`."""


def read_sources(
    audit: Audit, part: Literal["train", "eval"], section: DataSection, wanted: Wanted, writer: RowWriter
) -> Owners:
    """Write the rows of a part's sources that something can be learnt from; count the others.

    Raises:
        UserError: a source cannot be read, or a row is malformed.
    """
    owners: Owners = {}
    for source in section.sources if part == "train" else section.eval_sources:
        tally = SourceAudit(source.path, source.split, part, source.weight, 0, 0, {})
        audit.sources.append(tally)
        rows = Source(source.path, **source.reading, limit=section.limit, ignore=section.ignore)
        with stage(f"reading {source.path}"):
            admitted = _admit(one_form(rows, turns=source.turns), tally, owners, section, wanted, writer)
        tally.read, tally.joined, tally.columns_ignored = rows.read, rows.joined, dict(rows.ignored)
        tally.columns_not_read = dict(admitted.unread)
        tally.refused = dict(rows.refused)
        for reason, count in admitted.refused.items():
            tally.refused[reason] = tally.refused.get(reason, 0) + count
    return owners


@dataclass
class _Admitted:
    """What became of a source's rows."""

    refused: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    bad: Malformed = field(default_factory=Malformed)


def _admit(
    rows: Iterable[Row], tally: SourceAudit, owners: Owners, section: DataSection, wanted: Wanted, writer: RowWriter
) -> _Admitted:
    least, needs_label = wanted.min_completions, wanted.needs_label
    instead = wanted.instead_of_one
    grade = partial(
        grade_row, grades=section.grades, min_completions=least, needs_label=needs_label, instead_of_one=instead
    )
    found, checked = _Admitted(), 0
    for row in rows:
        checked += 1
        if row.unread:
            found.unread.update(row.unread)
        owners.setdefault(row.source, tally)
        if row.loss_weight == 0:
            found.refused[ABSENT] += 1
            continue
        try:
            graded = grade(row)
        except BadRow as error:
            found.bad.add(error.message(row.source, row.number))
            continue
        except UnusableRow as why:
            found.refused[str(why)] += 1
            continue
        if reason := nothing_to_learn(graded, ordered=least > 1, imitate=wanted.imitate):
            found.refused[reason] += 1
            continue
        options = {**section.template_options, **graded.template_options}
        writer.add(changed(graded, weight=tally.weight, template_options=options))
    if checked and found.refused[ABSENT] == checked:
        raise UserError(f"{tally.path}: every row has a `{WEIGHT}` of 0; give weights, or remove the source")
    found.bad.check()
    return found


def grade_row(
    row: Row,
    *,
    grades: GradeMethod,
    min_completions: int,
    needs_label: bool = False,
    instead_of_one: str = INSTEAD_OF_ONE,
) -> Row:
    """The row with grades: its own, or those of its rewards; a lone completion without either gets 1.

    Raises:
        BadRow: fewer completions than training needs, several and nothing that orders them, or one where it
            `needs_label` with none, or with a reward that its grade would not depend on.
        UnusableRow: fewer than training needs, of a row whose number of completions is what was found for its prompt.
    """
    if len(row.completions) < min_completions and row.gathered:
        raise UnusableRow("a lone completion")
    if len(row.completions) < min_completions:
        if min_completions > 2:
            problem = f"{len(row.completions)}, and the objective needs lists of {min_completions} or more"
            raise BadRow("completions", problem, "give more, or take an objective of pairs such as `logistic`")
        raise BadRow("completions", "1 completion, and learning from preferences needs 2 or more", instead_of_one)
    if row.grades is not None:
        return row
    if row.rewards is not None:
        if needs_label and len(row.completions) == 1 and grades != "raw":
            problem = f"missing, and the reward of a lone completion says nothing under `data.grades: {grades}`"
            remedy = "give `label`, true or false, or `data.grades: raw` where the rewards are above 1/2 for good ones"
            raise BadRow("label", problem, remedy)
        return changed(row, grades=tuple(grades_from_rewards(row.rewards, grades)))
    if needs_label and len(row.completions) == 1:
        found = f" (columns not read: {', '.join(row.unread)})" if row.unread else ""
        raise BadRow("label", f"missing{found}", "give `label`: true for a good completion, false for a bad one")
    if len(row.completions) == 1 or (min_completions == 1 and ATTRIBUTES in row.meta):
        return changed(row, grades=(1.0,) * len(row.completions))
    raise BadRow("grades", "missing", "give `grades`, `rewards`, `scores` or `ranks`, one per completion")


def nothing_to_learn(row: Row, *, ordered: bool, imitate: bool) -> str:
    """Why nothing can be learnt from a row, by its order or by imitating its best completion; empty where it can."""
    if imitate and row.grades == (0.0,):
        return "its only completion is graded 0, as a label that is false"
    if not ordered:
        return ""
    if all(completion == row.completions[0] for completion in row.completions):
        return "all completions identical"
    return "all grades tied" if len(set(row.grades or ())) == 1 else ""
