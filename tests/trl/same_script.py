"""One script, run with TRL's import and with ours: what it logs must be the same."""

import importlib
import random
from collections.abc import Iterator
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

TIMES = ("runtime", "per_second")


def pairs(count: int, *, seed: int = 0, longest: int = 9) -> Dataset:
    """Pairs of text in the words of the tests' tokenizer."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{draw.randint(3, 39)}" for _ in range(draw.randint(least, most))) + " "

    rows = [{"prompt": words(2, 8), "chosen": words(1, longest), "rejected": words(1, longest)} for _ in range(count)]
    return Dataset.from_list(rows)


def trainer(package: str, name: str, output: Path, model: Any, options: dict, **given: Any) -> Any:
    """A trainer of one package.

    Args:
        package: "trl" or "align.trl", or a module of theirs.
        name: such as DPO.
        options: of the configuration.
    """
    module = importlib.import_module(package)
    common = {
        "output_dir": str(output / package),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "bf16": False,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "max_steps": 20,
    }
    args = getattr(module, f"{name}Config")(**common | options)
    return getattr(module, f"{name}Trainer")(model=model, args=args, **given)


def assert_same_lines(theirs: list[dict], ours: list[dict], *, without: tuple[str, ...] = ()) -> None:
    """The same lines of the log under the same names, to 1e-5 of a figure or of 1: float32 sums differ in their order.

    Which of two equal rewards is larger is rounding, so accuracies are compared where rewards have parted.

    Args:
        without: figures that are not compared.
    """
    assert len(ours) == len(theirs) > 1
    for line, their_line in zip(ours, theirs, strict=True):
        assert line.keys() == their_line.keys()
        tied = max(abs(x.get("rewards/margins", 1.0)) for x in (line, their_line)) < 1e-5
        left_out = (*TIMES, *without, *(["rewards/accuracies"] if tied else []))
        for key in [k for k in line if not any(word in k for word in left_out)]:
            assert line[key] == pytest.approx(their_line[key], rel=1e-5, abs=1e-5), (key, line["step"])


def log_histories(name: str, output: Path, model: Any, options: dict, **given: Any) -> Iterator[list[dict]]:
    """The log of TRL's trainer, then of ours; what is given may be a function that makes it anew for each."""
    for package in given.pop("packages", ("trl", "align.trl")):
        made = {key: value() if isfunction(value) else value for key, value in given.items()}
        one = trainer(package, name, output, model() if isfunction(model) else model, options, **made)
        one.train()
        yield one.state.log_history
