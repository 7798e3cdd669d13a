"""What was measured of a run after its training: who wins, what it forgot, and what its exports cost."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from align.errors import UserError
from align.files import read_json

EVALUATION = "evaluate/evaluate.json"
BENCHMARKS = "benchmarks.json"
EXPORT = "export.json"


class Interval(BaseModel):
    """A mean, and where it may lie."""

    mean: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None


class Judge(BaseModel):
    """One judge's figures of a policy against another side."""

    name: str
    win_rate: Interval | None
    win_rate_discrete: Interval | None
    win_rate_lc: Interval | None
    position_bias: Interval | None
    reward_change: Interval | None


class Evaluation(BaseModel):
    """What the page shows of evaluate.json."""

    policy: str
    against: str
    prompts: int
    judges: list[Judge] = Field(min_length=1)


class Benchmark(BaseModel):
    """One figure of the harness."""

    before: FiniteFloat | None
    after: FiniteFloat
    change: FiniteFloat | None
    standard_error: FiniteFloat | None
    forgot: bool


class Benchmarks(BaseModel):
    """What the page shows of benchmarks.json: figures by task and name."""

    tasks: dict[str, dict[str, Benchmark]]


class Export(BaseModel):
    """What the page shows of export.json."""

    engine: str
    tokens: int
    mean_logprob_difference: FiniteFloat
    max_logprob_difference: FiniteFloat
    pair_accuracy_before: FiniteFloat | None
    pair_accuracy_after: FiniteFloat | None


RATES = (
    ("win_rate", "win rate", "{:.3f}"),
    ("win_rate_discrete", "win rate, discrete", "{:.3f}"),
    ("win_rate_lc", "win rate at equal lengths", "{:.3f}"),
    ("position_bias", "bias for the first shown", "{:+.3f}"),
    ("reward_change", "change of the reward", "{:+.3f}"),
)
"""Intervals of a judge: key, what it is called, and its format."""

Shown = TypeVar("Shown", bound=BaseModel)


def read_measured(path: Path, kind: type[Shown]) -> Shown | None:
    """What a file of figures holds; None where there is none.

    Raises:
        UserError: it is damaged; names the figure.
    """
    if not path.exists():
        return None
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; restore the file, or measure again") from None


def read_export(folder: Path) -> Export:
    """The figures of an export's comparison with its run.

    Raises:
        UserError: it was not compared, or its file is damaged.
    """
    found = read_measured(folder / EXPORT, Export)
    if found is None:
        raise UserError(f"{folder}: holds no {EXPORT}; give a folder that `align export` wrote")
    return found
