"""Experiment trackers: transformers' integrations, told the recipe, the held-out figures and the samples as well."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

PROJECT_VARIABLES = (
    "WANDB_PROJECT",
    "COMET_PROJECT_NAME",
    "MLFLOW_EXPERIMENT_NAME",
    "CLEARML_PROJECT",
    "SWANLAB_PROJECT",
)
"""Where transformers' integrations read a project's name; what a user has set there stays."""
SAMPLE_COLUMNS = ("prompt", "before", "after", "reward_before", "reward_after")


def run_name(path: Path) -> str:
    """What a run is called: its folder, and of an online run's training also the iteration."""
    path = path.resolve()
    return f"{path.parents[2].name}-{path.parent.name}" if path.parent.parent.name == "iterations" else path.name


def set_project(name: str) -> None:
    """Let every tracker put the run into this project, unless the environment names another one."""
    for variable in PROJECT_VARIABLES:
        os.environ.setdefault(variable, name)


def flat(tree: Any, path: str) -> dict[str, Any]:
    """A recipe's values under dotted keys: every tracker takes them, and lists of sections are numbered."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if _has_sections(tree) else None
    if items is None:
        return {path: tree}
    return {key: value for name, below in items for key, value in flat(below, f"{path}.{name}").items()}


def _has_sections(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(own, Mapping) for own in value)


class Tracking:
    """The trackers of a training, open until its last figures are known: transformers ends them with the last step."""

    def __init__(self, callbacks: Sequence["TrainerCallback"]) -> None:
        """Args:
        callbacks: a Trainer's; those of trackers are kept from ending.
        """
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        kinds = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
        self.trackers = {kinds[type(own)]: own for own in callbacks if type(own) in kinds}
        self.ends: list[Callable[..., None]] = [own.on_train_end for own in self.trackers.values()]
        self.theirs = {name for name, own in self.trackers.items() if name in RUNNING and RUNNING[name](own)}
        """Those whose run was open before this one, which goes on in it and leaves it open."""
        for own in self.trackers.values():
            own.on_train_end = lambda *_, **__: None  # type: ignore[method-assign]

    def end(self, samples: Sequence[Mapping[str, Any]], summary: Mapping[str, float], step: int, *event: Any) -> None:
        """The last words: a table of samples, figures of the whole run, and what transformers does at the end.

        Args:
            samples: as in a run's summary.
            summary: figures that have no curve.
            step: optimizer steps taken.
            event: the arguments, state and control that callbacks get.
        """
        columns = [name for name in SAMPLE_COLUMNS if samples and name in samples[0]]
        rows = [[sample[name] for name in columns] for sample in samples]
        for name, tracker in self.trackers.items():
            if name in LAST_WORDS:
                LAST_WORDS[name](tracker, columns, rows, summary, step)
        for end in self.ends:
            end(*event)
        for name, tracker in self.trackers.items():
            if name in CLOSE and name not in self.theirs:
                CLOSE[name](tracker)


def _tensorboard(tracker: Any, columns: list[str], rows: list[list[Any]], summary: Mapping, step: int) -> None:
    if tracker.tb_writer is None:
        return
    for name, value in summary.items():
        tracker.tb_writer.add_scalar(f"summary/{name}", value, step)
    cells = [columns, ["---"] * len(columns), *rows]
    lines = ["| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in row) + " |" for row in cells]
    if rows:
        tracker.tb_writer.add_text("samples", "\n".join(lines), step)


def _wandb(tracker: Any, columns: list[str], rows: list[list[Any]], summary: Mapping, step: int) -> None:
    if tracker._wandb.run is None:
        return
    tracker._wandb.run.summary.update({f"summary/{name}": value for name, value in summary.items()})
    if rows:
        tracker._wandb.log({"samples": tracker._wandb.Table(columns=columns, data=rows)})


def _trackio(tracker: Any, columns: list[str], rows: list[list[Any]], summary: Mapping, step: int) -> None:
    import pandas

    tracker._trackio.log({f"summary/{name}": value for name, value in summary.items()})
    if rows:
        tracker._trackio.log({"samples": tracker._trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))})


def _mlflow(tracker: Any, columns: list[str], rows: list[list[Any]], summary: Mapping, step: int) -> None:
    if tracker._ml_flow.active_run() is None:
        return
    tracker._ml_flow.log_metrics({f"summary/{name}": value for name, value in summary.items()}, step=step)
    if rows:
        table = {name: [row[place] for row in rows] for place, name in enumerate(columns)}
        tracker._ml_flow.log_table(table, "samples.json")


def _comet(tracker: Any, columns: list[str], rows: list[list[Any]], summary: Mapping, step: int) -> None:
    if tracker._experiment is None:
        return
    tracker._experiment.log_metrics({f"summary/{name}": value for name, value in summary.items()}, step=step)
    if rows:
        tracker._experiment.log_table("samples.csv", tabular_data=rows, headers=columns)


LAST_WORDS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow, "comet_ml": _comet}
"""Trackers that show tables -> how each is told; the others get every figure that has a curve."""
RUNNING: dict[str, Callable[[Any], Any]] = {
    "wandb": lambda tracker: tracker._wandb.run,
    "comet_ml": lambda tracker: importlib.import_module("comet_ml").get_running_experiment(),
}
CLOSE: dict[str, Callable[[Any], Any]] = {
    "wandb": lambda tracker: tracker._wandb.finish(),
    "comet_ml": lambda tracker: tracker._experiment and tracker._experiment.end(),
}
"""What transformers leaves to the end of the process, where an online run's next iteration would go on in it."""
