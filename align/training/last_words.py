"""What trackers are told at a run's end besides its curves: final figures, the samples as a table, and its files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE_COLUMNS = ("prompt", "before", "after", "reward_before", "reward_after")
REPORT = "report.html"
FILES = (REPORT, "recipe.yaml", "summary.json", "metrics.jsonl")
"""Of a run's folder."""


@dataclass(frozen=True)
class LastWords:
    """What is said, whichever the tracker."""

    columns: list[str]
    rows: list[list[Any]]
    """Of the table of samples; none where nothing was sampled."""
    figures: Mapping[str, float]
    """Those of the whole run, which have no curve."""
    step: int
    folder: Path
    """The run's."""

    @staticmethod
    def of(samples: Sequence[Mapping[str, Any]], figures: Mapping[str, float], step: int, folder: Path) -> "LastWords":
        """Args:
        samples: as in a run's summary.
        figures: by names that become those of a group `summary`.
        """
        columns = [name for name in SAMPLE_COLUMNS if samples and name in samples[0]]
        rows = [[sample[name] for name in columns] for sample in samples]
        return LastWords(columns, rows, {f"summary/{name}": value for name, value in figures.items()}, step, folder)

    @property
    def files(self) -> list[Path]:
        """The run's files that are there."""
        return [self.folder / name for name in FILES if (self.folder / name).exists()]


def _tensorboard(tracker: Any, last: LastWords) -> None:
    if tracker.tb_writer is None:
        return
    for name, value in last.figures.items():
        tracker.tb_writer.add_scalar(name, value, last.step)
    cells = [last.columns, ["---"] * len(last.columns), *last.rows]
    lines = ["| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in row) + " |" for row in cells]
    if last.rows:
        tracker.tb_writer.add_text("samples", "\n".join(lines), last.step)


def _wandb(tracker: Any, last: LastWords) -> None:
    wandb = tracker._wandb
    if wandb.run is None:
        return
    wandb.run.summary.update(last.figures)
    if last.rows:
        wandb.log({"samples": wandb.Table(columns=last.columns, data=last.rows)})
    files = wandb.Artifact(f"run-{wandb.run.id}-files", type="align-run")
    for file in last.files:
        files.add_file(str(file))
        if file.name == REPORT:
            wandb.log({"report": wandb.Html(file.read_text(encoding="utf-8"), inject=False)})
    wandb.run.log_artifact(files)


def _trackio(tracker: Any, last: LastWords) -> None:
    import pandas

    trackio = tracker._trackio
    trackio.log(dict(last.figures))
    if last.rows:
        trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(last.rows, columns=last.columns))})
    for file in last.files:
        trackio.log_artifact(file, type="align-run")


def _mlflow(tracker: Any, last: LastWords) -> None:
    mlflow = tracker._ml_flow
    if mlflow.active_run() is None:
        return
    mlflow.log_metrics(dict(last.figures), step=last.step)
    if last.rows:
        mlflow.log_table({name: [row[i] for row in last.rows] for i, name in enumerate(last.columns)}, "samples.json")
    for file in last.files:
        mlflow.log_artifact(str(file))


def _comet(tracker: Any, last: LastWords) -> None:
    experiment = tracker._experiment
    if experiment is None:
        return
    experiment.log_metrics(dict(last.figures), step=last.step)
    if last.rows:
        experiment.log_table("samples.csv", tabular_data=last.rows, headers=last.columns)
    for file in last.files:
        experiment.log_asset(str(file), file_name=file.name)


def _swanlab(tracker: Any, last: LastWords) -> None:
    swanlab = tracker._swanlab
    if swanlab.get_run() is None:
        return
    swanlab.log(dict(last.figures), step=last.step)
    if last.rows:
        table = swanlab.echarts.Table().add(last.columns, [[str(cell) for cell in row] for row in last.rows])
        swanlab.log({"samples": table}, step=last.step)
    if (last.folder / REPORT).exists() and hasattr(swanlab, "Html"):
        swanlab.log({"report": swanlab.Html(last.folder / REPORT)}, step=last.step)


def _clearml(tracker: Any, last: LastWords) -> None:
    task = tracker._clearml_task
    if task is None:
        return
    for name, value in last.figures.items():
        task.get_logger().report_single_value(name=name, value=value)
    if last.rows:
        cells = [last.columns, *last.rows]
        task.get_logger().report_table(title="samples", series="samples", iteration=last.step, table_plot=cells)
    for file in last.files:
        task.upload_artifact(name=file.stem, artifact_object=str(file))


def _dvclive(tracker: Any, last: LastWords) -> None:
    if tracker.live is None:
        return
    tracker.live.summary.update(last.figures)
    for file in last.files:
        tracker.live.log_artifact(file, copy=True, cache=False)


LAST_WORDS: dict[str, Callable[[Any, LastWords], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
    "dagshub": _mlflow,
    "comet_ml": _comet,
    "swanlab": _swanlab,
    "clearml": _clearml,
    "dvclive": _dvclive,
}
"""Trackers that take more than curves -> how each is told; the others get every figure that has a curve."""
