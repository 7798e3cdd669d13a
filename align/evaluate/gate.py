"""`align gate`: whether what was measured is good enough to go on, as an exit code.

A requirement is `NAME OPERATOR NUMBER`, such as `win_rate.low > 0.5`; nothing in it is evaluated. A name is a figure's
path in its JSON file, or the end of that path: `best_logprob_change` is `eval_after.best_logprob_change` of a run's
summary.json.
"""

import difflib
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from align.errors import UserError
from align.files import read_json, write_json
from align.progress import counted
from align.runs.digests import Digests
from align.tables import Table

RESULTS = (
    "summary.json",
    "evaluate.json",
    "evaluate/evaluate.json",
    "export.json",
    "benchmarks.json",
    "benchmarks/benchmarks.json",
    "study.json",
)
"""What is read of a folder, where it is there."""
OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
REQUIREMENT = re.compile(rf"\s*(?P<name>[^<>=!\s][^<>!\s]*?)\s*(?P<sign>{'|'.join(OPERATORS)})\s*(?P<bound>\S+)\s*")
FIRST = "eval_after."
"""How the figures begin that are meant where a summary has one of a name before training and after."""
FAILS = 3
"""Exit code where a requirement does not hold."""
NEAR = 5

Figures = dict[str, float]
"""Dotted path -> value; null is nan, which no requirement holds for."""


class Requirement(NamedTuple):
    text: str
    name: str
    sign: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether a value meets it; nan does not, whatever is asked of it."""
        return not math.isnan(value) and bool(OPERATORS[self.sign](value, self.bound))


class Verdict(NamedTuple):
    """A requirement on one file's figure."""

    requirement: Requirement
    file: Path
    figure: str
    value: float

    @property
    def holds(self) -> bool:
        return self.requirement.holds(self.value)

    def as_json(self) -> dict[str, Any]:
        """For a machine; what was not measured, or is infinite, is null."""
        names = {"require": self.requirement.text, "file": str(self.file), "figure": self.figure}
        value = self.value if math.isfinite(self.value) else None
        about = {"operator": self.requirement.sign, "bound": self.requirement.bound, "holds": self.holds}
        return {**names, "value": value, **about}


def gate(
    paths: Sequence[str], *, require: Sequence[str], json_path: str | None = None, console: Console | None = None
) -> None:
    """Check requirements against what runs, evaluations, exports and studies wrote; print what held and what did not.

    A requirement must hold in every file that has its figure.

    Args:
        paths: run directories, other folders with results, or JSON files.
        require: `NAME OPERATOR NUMBER`.
        json_path: where the verdicts are written too.

    Raises:
        UserError: a requirement cannot be read, no file has its figure, or a file is damaged or not there.
        SystemExit: with 3, after all, where one does not hold.
    """
    console = console or Console()
    wanted = [read_requirement(text) for text in require]
    found = {file: figures_of(read_json(file)) for path in paths for file in _files(Path(path))}
    verdicts = [verdict for one in wanted for verdict in _judged(one, found)]
    console.print(_table(verdicts))
    failed = sum(not verdict.holds for verdict in verdicts)
    if json_path:
        write_json(Path(json_path), {"holds": not failed, "requirements": [one.as_json() for one in verdicts]})
    if failed:
        console.print(f"the gate is shut: {failed} of {counted(len(verdicts), 'requirement')} not met")
        raise SystemExit(FAILS)
    console.print(f"the gate is open: {counted(len(verdicts), 'requirement')} met")


def read_requirement(text: str) -> Requirement:
    """`win_rate.low > 0.5` in its parts.

    Raises:
        UserError: it is none, or its number is not finite.
    """
    found = REQUIREMENT.fullmatch(text)
    try:
        bound = float(found["bound"]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        signs = ", ".join(OPERATORS)
        raise UserError(f"--require '{text}': write a figure, one of {signs}, and a number, as in 'win_rate.low > 0.5'")
    return Requirement(text, found["name"], found["sign"], bound)


def figures_of(tree: Any, path: str = "") -> Figures:
    """Every number in a JSON tree by its dotted path; in lists the place, from 0 on. True is 1, and null nan."""
    if isinstance(tree, dict | list):
        below = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, own in below for k, v in figures_of(own, f"{path}.{name}".lstrip(".")).items()}
    if tree is None:
        return {path: math.nan}
    return {path: float(tree)} if isinstance(tree, int | float) else {}


def _files(place: Path) -> list[Path]:
    """The results that a path holds.

    Raises:
        UserError: there are none, or they are not as the run wrote them.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{place}: there is no such file or folder")
    found = [place / name for name in RESULTS if (place / name).is_file()]
    if not found:
        hint = "; let `align train` finish the run" if (place / "recipe.yaml").is_file() else ""
        raise UserError(f"{place}: holds no results ({', '.join(RESULTS)}){hint}, or give a JSON file")
    if problem := Digests(place).problem(["summary.json", "export.json"]):
        raise UserError(f"{problem}; the command that wrote it makes it anew")
    return found


def _judged(wanted: Requirement, found: Mapping[Path, Figures]) -> Iterator[Verdict]:
    """The requirement in each file that has its figure.

    Raises:
        UserError: none has, with those of a similar name; or one has several.
    """
    names = {file: _named(wanted.name, figures, file) for file, figures in found.items()}
    if not any(names.values()):
        raise UserError(f"--require '{wanted.text}': no figure is called `{wanted.name}`{_near(wanted.name, found)}")
    for file, name in names.items():
        if name:
            yield Verdict(wanted, file, name, found[file][name])


def _named(name: str, figures: Figures, file: Path) -> str | None:
    """The path of the figure that a name means: its own, its mean, or the one that ends with either; of an interval
    that is null, the interval's.

    Raises:
        UserError: several paths do.
    """
    for whole in (name, FIRST + name, f"{name}.mean"):
        if whole in figures:
            return whole
    above = name.rpartition(".")[0]
    if math.isnan(figures.get(above, 0.0)):
        return above
    for end in (f".{name}", f".{name}.mean"):
        alike = [path for path in figures if path.endswith(end)]
        if len(alike) > 1:
            listed = ", ".join(alike[:NEAR]) + (", ..." if len(alike) > NEAR else "")
            raise UserError(f"`{name}` is more than one figure of {file}: give {listed}")
        if alike:
            return alike[0]
    return None


def _near(name: str, found: Mapping[Path, Figures]) -> str:
    """The figures whose path, or end of it, is most like a name."""
    ends = {
        ".".join(parts[at:]): path
        for figures in found.values()
        for path in figures
        for parts in [path.split(".")]
        for at in range(len(parts))
    }
    alike = [ends[end] for end in difflib.get_close_matches(name, ends, n=2 * NEAR, cutoff=0.6)]
    near = list(dict.fromkeys(alike))[:NEAR] or sorted(ends.values(), key=len)[:NEAR]
    return f"; there are {', '.join(dict.fromkeys(near))}" if near else f"; {', '.join(map(str, found))} hold none"


def _table(verdicts: Sequence[Verdict]) -> Table:
    several = len({verdict.file for verdict in verdicts}) > 1
    table = Table()
    for header in ("requirement", "figure", "value", "", *(["file"] if several else [])):
        table.add_column(header)
    for verdict in verdicts:
        value = "not measured" if math.isnan(verdict.value) else f"{verdict.value:.6g}"
        word = "holds" if verdict.holds else "FAILS"
        table.add_row(verdict.requirement.text, verdict.figure, value, word, *([str(verdict.file)] if several else []))
    return table
