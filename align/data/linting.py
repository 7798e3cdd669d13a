"""Rows as texts, what the checks of `align.lint` say of them, and the stop that a recipe may ask for."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.schema import Row, Text, is_messages
from align.errors import UserError
from align.lint import CHEAP, CHECK, Finding, TextRow, look
from align.progress import counted, stage

SYSTEM = ("system", "developer")


def lint(
    train: Sequence[Row], heldout: Sequence[Row], tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
) -> dict[str, Finding | None]:
    """What the checks of these names say, None where they find nothing of the kind.

    Args:
        train, heldout: the rows that are used, with grades.
        tokenizer: decodes rows of token ids.
    """
    if not names:
        return {}
    with stage(f"looking at {counted(len(train) + len(heldout), 'row')}"):
        found = look(Side(train, False), names, partial(_text_row, tokenizer), heldout=Side(heldout, True))
    return dict.fromkeys(names) | {own.check: own for own in found}


def wanted_checks(*, stop_on: Sequence[str], thorough: bool) -> list[str]:
    """Every check where it is `thorough`; else those that every run can afford and those of `stop_on`."""
    return [name for name in CHECK.classes if thorough or name in CHEAP or name in stop_on]


def check_findings(found: Sequence[Finding], stop_on: Sequence[str]) -> None:
    """Raise UserError where a check of `stop_on` found what it looks for."""
    for own in found:
        if own.bad and own.check in stop_on:
            places = f" (such as {own.places[0]})" if own.places else ""
            raise UserError(
                f"data.stop_on: {own.check}: {own.words}{places}; mend the rows, or take it out of `data.stop_on`"
            )


class Side(Sequence[tuple[Row, bool]]):
    """Rows with their side, each read when it is asked for."""

    def __init__(self, rows: Sequence[Row], heldout: bool) -> None:
        self.rows, self.heldout = rows, heldout

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.rows[place], self.heldout


def _text_row(tokenizer: PreTrainedTokenizerBase, given: tuple[Row, bool]) -> TextRow:
    row, heldout = given
    return TextRow(
        prompt=_prompt(row.prompt, tokenizer),
        completions=tuple(_completion(own, tokenizer) for own in row.completions),
        grades=row.grades or (),
        place=row.place,
        heldout=heldout,
        chat=is_messages(row.prompt),
    )


def _prompt(prompt: Text, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str) or not is_messages(prompt):
        return _decoded(prompt, tokenizer)
    return "\n".join(own["content"] for own in prompt if own["role"] not in SYSTEM)  # type: ignore[index, call-overload]


def _completion(completion: Text, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(completion, str) or not is_messages(completion):
        return _decoded(completion, tokenizer)
    return "\n".join(own["content"] for own in completion if own["role"] == "assistant")  # type: ignore[index, call-overload]


def _decoded(text: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    return text if isinstance(text, str) else str(tokenizer.decode(text))
