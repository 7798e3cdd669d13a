"""All the steps from sources to token ids, with their audit."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.data.audit import Audit, SourceAudit, audit_rows, audit_tokens
from align.data.boundary import Overlong
from align.data.contrast import Templates
from align.data.schema import ATTRIBUTES, BadRow, Row, malformed
from align.data.select import Selection, hold_out, reduce_row, without_prompts_of
from align.data.sources import Source, read_source
from align.data.tokenize import COUNTS, tokenize_rows
from align.errors import UserError
from align.progress import stage
from rewards.grading import GradeMethod, grades_from_rewards

Owners = dict[str, SourceAudit]
"""Who counts the rows of a file or hub data set."""


@dataclass(frozen=True)
class Prepared:
    """What the trainer needs of the data."""

    train: Dataset
    """Columns id, prompt_ids, completion_ids, grades, weight, source, row; with `contrast` better_ids and worse_ids."""
    heldout: Dataset
    """Likewise; whole lists, whatever `select` and `list_size` do to the training lists."""
    audit: Audit
    train_rows: list[Row]
    """The rows of `train`, in its order; a list's `kept` says which of its row's completions it has."""
    heldout_rows: list[Row]
    """Likewise of `heldout`."""


def prepare_data(
    *,
    sources: Sequence[Source],
    eval_sources: Sequence[Source] = (),
    eval_fraction: float = 0.1,
    grades: GradeMethod = "win_probability",
    select: Selection = "all",
    list_size: int | None = None,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    overlong: Overlong = "truncate",
    append_eos: bool | None = True,
    limit: int | None = None,
    ignore: Sequence[str] = (),
    workers: int = 1,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    min_completions: int = 2,
    seed: int = 0,
    contrast: Templates | None = None,
    token_weights: bool = False,
    needs_label: bool = False,
) -> Prepared:
    """Read, grade, split, reduce and tokenise; count everything.

    Args:
        sources, ..., workers: as in a recipe's `data` section.
        select: there, or `best` for the best completion alone.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own; see `read_chat_template`.
        min_completions: 2 to learn from preferences (lists without an order are then left out), else 1.
        seed: decides what is held out and which completions a reduced list keeps.
        contrast: templates of the two contexts for token rewards, where those are wanted.
        token_weights: whether the rows' own weights of tokens are wanted.
        needs_label: whether a lone completion without label, grade or reward is refused; else it counts as good.

    Returns:
        Both parts as token ids, the audit and the held-out rows; nothing may be held out.

    Raises:
        UserError: a source cannot be read, a row is malformed, or no training row is left.

    Source: ours
    """
    audit = Audit()
    grade = partial(grade_row, grades=grades, min_completions=min_completions, needs_label=needs_label)
    useless = partial(_nothing_to_learn, ordered=min_completions > 1, imitate=select == "best")
    read = partial(_read_sources, audit, grade=grade, useless=useless, limit=limit, ignore=ignore)
    tokenize = partial(
        tokenize_rows,
        tokenizer=tokenizer,
        chat_template=chat_template,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        overlong=overlong,
        append_eos=append_eos,
        workers=workers,
        contrast=contrast,
        token_weights=token_weights,
    )
    train_rows, owners = read("train", sources)
    heldout_rows, eval_owners = read("eval", eval_sources)
    _check_ignored(audit, ignore)
    if eval_sources:
        train_rows = _without_shared_prompts(train_rows, heldout_rows, owners)
    else:
        (train_rows, heldout_rows), eval_owners = hold_out(train_rows, eval_fraction, seed), owners
    train_rows = [reduce_row(row, select=select, list_size=list_size, seed=seed) for row in train_rows]
    train, train_rows = _usable(train_rows, tokenize(train_rows), owners, 1 if select == "best" else min_completions)
    heldout, heldout_rows = _usable(heldout_rows, tokenize(heldout_rows), eval_owners, min_completions)
    audit_rows(audit, [*train_rows, *heldout_rows])
    return _finish(audit, train, heldout, train_rows, heldout_rows)


def grade_row(row: Row, *, grades: GradeMethod, min_completions: int, needs_label: bool = False) -> Row:
    """The row with grades: its own, or those of its rewards; a lone completion without either gets 1.

    Raises:
        BadRow: fewer completions than training needs, several and nothing that orders them, or one where it
            `needs_label` with none, or with a reward that its grade would not depend on.
    """
    if len(row.completions) < min_completions:
        problem = f"{len(row.completions)} completion, and learning from preferences needs {min_completions} or more"
        remedy = "give more, or train with `objective: {name: kto}` or `task: sft`"
        raise BadRow("completions", problem, remedy)
    if row.grades is not None:
        return row
    if row.rewards is not None:
        if needs_label and len(row.completions) == 1 and grades != "raw":
            problem = f"missing, and the reward of a lone completion says nothing under `data.grades: {grades}`"
            remedy = "give `label`, true or false, or `data.grades: raw` where the rewards are above 1/2 for good ones"
            raise BadRow("label", problem, remedy)
        return replace(row, grades=tuple(grades_from_rewards(row.rewards, grades)))
    if needs_label and len(row.completions) == 1:
        found = f" (columns not read: {', '.join(row.unread)})" if row.unread else ""
        raise BadRow("label", f"missing{found}", "give `label`: true for a good completion, false for a bad one")
    if len(row.completions) == 1 or (min_completions == 1 and ATTRIBUTES in row.meta):
        return replace(row, grades=(1.0,) * len(row.completions))
    raise BadRow("grades", "missing", "give `grades`, `rewards`, `scores` or `ranks`, one per completion")


def _read_sources(
    audit: Audit,
    part: str,
    sources: Sequence[Source],
    *,
    grade: Callable[[Row], Row],
    useless: Callable[[Row], str],
    limit: int | None,
    ignore: Sequence[str],
) -> tuple[list[Row], Owners]:
    rows: list[Row] = []
    owners: Owners = {}
    for source in sources:
        with stage(f"reading {source.path}"):
            got = read_source(source.path, split=source.split, revision=source.revision, limit=limit, ignore=ignore)
        tally = SourceAudit(
            source.path,
            source.split,
            part,
            source.weight,
            got.read,
            0,
            got.refused,
            columns_not_read=dict(Counter(name for row in got.rows for name in row.unread)),
            columns_ignored=got.ignored,
        )
        audit.sources.append(tally)
        bad: list[str] = []
        for row in got.rows:
            owners.setdefault(row.source, tally)
            try:
                graded = grade(row)
            except BadRow as error:
                bad.append(error.message(row.source, row.number))
                continue
            reason = useless(graded)
            if reason:
                _refuse(tally, reason)
            else:
                rows.append(replace(graded, weight=source.weight))
        if bad:
            raise malformed(bad)
    return rows, owners


def _check_ignored(audit: Audit, ignore: Sequence[str]) -> None:
    """Refuse a name to ignore that no row has: a slip there would look like a column that is ignored."""
    for name in ignore:
        if not any(source.columns_ignored.get(name) for source in audit.sources):
            raise UserError(f"data.ignore: no row has a column `{name}`; name one that the rows have")


def _nothing_to_learn(row: Row, *, ordered: bool, imitate: bool) -> str:
    """Why nothing can be learnt from a row, by its order or by imitating its best completion; empty where it can."""
    if imitate and row.grades == (0.0,):
        return "its only completion is graded 0, as a label that is false"
    if not ordered:
        return ""
    if all(completion == row.completions[0] for completion in row.completions):
        return "all completions identical"
    return "all grades tied" if len(set(row.grades or ())) == 1 else ""


def _without_shared_prompts(rows: list[Row], heldout: list[Row], owners: Owners) -> list[Row]:
    kept = without_prompts_of(rows, heldout)
    left = {id(row) for row in kept}
    for row in rows:
        if id(row) not in left:
            _refuse(owners[row.source], "prompt is among the evaluation rows")
    return kept


def _usable(rows: list[Row], tokens: Dataset, owners: Owners, min_completions: int) -> tuple[Dataset, list[Row]]:
    """Tokens and rows without those of which too little is left; every row is counted with its source."""
    kept = []
    names = ("refused", "identical", "grades", "completion_left_out", "identical_uncut")
    left = zip(*(tokens[name][:] for name in names), strict=True)
    for position, (reason, identical, grades, left_out, uncut) in enumerate(left):
        if not reason and len(grades) < min_completions:
            reason = f"fewer than {min_completions} completions within max_length"
        if not reason and min_completions > 1 and identical:
            reason = _why_identical(left_out if uncut else [])
        if not reason and min_completions > 1 and len(set(grades)) == 1:
            reason = "all grades tied among the completions within max_length"
        if reason:
            _refuse(owners[rows[position].source], reason)
        else:
            owners[rows[position].source].used += 1
            kept.append(position)
    return tokens.select(kept), [rows[position] for position in kept]


def _why_identical(left_out: list[str]) -> str:
    """Completions that differ as texts and not as tokens: which text of them is in no token, if any."""
    if not left_out:
        return "all completions identical within max_length"
    keys = ", ".join(sorted(set(left_out)))
    return (
        f"completions that differ only in text that the chat template leaves out ({keys}; give `policy.chat_template` "
        "one that writes it)"
    )


def _finish(audit: Audit, train: Dataset, heldout: Dataset, train_rows: list[Row], heldout_rows: list[Row]) -> Prepared:
    audit.train_lists, audit.heldout_lists = len(train), len(heldout)
    audit_tokens(audit, [train, heldout])
    if not len(train):
        sources = [source for source in audit.sources if source.part == "train"]
        refused = [f"{count} {reason}" for source in sources for reason, count in source.refused.items()]
        reasons, read = ", ".join(refused) or "all rows are held out", sum(source.read for source in sources)
        raise UserError(f"data.sources: no training row is left of {read} ({reasons}); mend them or add others")
    counts = list(COUNTS)
    return Prepared(train.remove_columns(counts), heldout.remove_columns(counts), audit, train_rows, heldout_rows)


def _refuse(tally: SourceAudit, reason: str) -> None:
    tally.refused[reason] = tally.refused.get(reason, 0) + 1
