"""What a recipe's `train.schedule` becomes: a learning-rate scheduler of the run's length."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from align.errors import UserError
from align.files import read_object
from align.recipe.schedules import BY_FIGURE, REFINED
from align.recipe.settings import TrainSection


def make_schedule(train: TrainSection, optimizer: Optimizer, *, steps: int) -> Any:
    """The scheduler of a run of `steps`.

    Raises:
        UserError: it does not take an option, or its file is none; names the key.
    """
    schedule = train.schedule
    if schedule.name == "refined":
        return LambdaLR(optimizer, _Factors(read_factors(schedule.options["path"]), steps))
    try:
        return get_scheduler(
            schedule.name,
            optimizer,
            num_warmup_steps=math.ceil(train.warmup_ratio * steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=_options(train, steps),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"train.schedule: `{schedule.name}`: {' '.join(str(error).split())}") from error


def _options(train: TrainSection, steps: int) -> dict[str, Any]:
    options = train.schedule.options
    if "decay_ratio" in options:
        options["num_decay_steps"] = math.ceil(options.pop("decay_ratio") * steps)
    if train.schedule.name in BY_FIGURE:
        options["mode"] = "min" if train.keep_best in (None, "loss") else "max"
    return options


class _Factors:
    """Factors of the learning rate, laid over a run of another length."""

    def __init__(self, factors: list[float], steps: int) -> None:
        self.factors, self.steps = factors, steps

    def __call__(self, step: int) -> float:
        place = min(step / max(1, self.steps - 1), 1.0) * (len(self.factors) - 1)
        below = min(int(place), len(self.factors) - 2)
        share = place - below
        return (1 - share) * self.factors[below] + share * self.factors[below + 1]


def read_factors(path: str) -> list[float]:
    """The factors that `align report RUN --refine` wrote.

    Args:
        path: the file, or the run's folder.

    Raises:
        UserError: there is none.
    """
    file = Path(path) / REFINED if Path(path).is_dir() else Path(path)
    remedy = "`align report RUN --refine` writes one into a run's folder"
    if not file.is_file():
        raise UserError(f"train.schedule: {file}: there is no refined schedule; {remedy}")
    factors = read_object(file).get("factors")
    numbers = isinstance(factors, list) and all(isinstance(own, int | float) and 0 <= own <= 1 for own in factors)
    if not numbers or len(factors) < 2:  # type: ignore[arg-type]
        raise UserError(f"train.schedule: {file}: holds no `factors` from 0 to 1; {remedy}")
    return [float(own) for own in factors]  # type: ignore[union-attr]


def rates(train: TrainSection, *, total: int, steps: int) -> list[float] | None:
    """The factors of the learning rate in the first steps of a run of `total`; None where figures decide them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    scheduler = make_schedule(train, optimizer, steps=total)
    if not isinstance(scheduler, LambdaLR):
        return None
    return [scheduler.lr_lambdas[0](step) for step in range(steps)]


def check_schedule(train: TrainSection) -> None:
    """Refuse, before there is a run, a schedule that cannot be made as the recipe says.

    Raises:
        UserError: says why.
    """
    try:
        rates(train, total=train.steps or 100, steps=2)
    except (TypeError, ValueError) as error:
        raise UserError(f"train.schedule: `{train.schedule.name}`: {' '.join(str(error).split())}") from error
